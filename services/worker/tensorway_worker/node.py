"""The node as a service: offers its model directories, keeps its replicas running, and tells what they do."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from functools import partial
from pathlib import Path
from typing import Any, Final

from tensorway.deadline import Deadline
from tensorway.errors import FailedPrecondition
from tensorway.model_directory import ModelDirectory, find_directories
from tensorway.registry.amending import amend
from tensorway.registry.patience import patiently
from tensorway.registry.port import DESIRED, GATEWAY, NODE, Registration, Registry
from tensorway.revisions import encode_revision, revision_key
from tensorway.service import ServiceContext
from tensorway.tls import OPEN_TO_MEMBERS, OPERATOR, WORKER, MeshTls, ServerTls
from tensorway_worker.adaptation import AdaptationHost
from tensorway_worker.devices import DevicePool, cuda_devices
from tensorway_worker.guest_host import GuestHost
from tensorway_worker.metrics import NodeCollector
from tensorway_worker.replicas import ReplicaKeeper
from tensorway_worker.servicer import NodeServicer
from tensorway_worker.settings import NodeSettings
from tensorway_worker.wish import first_wish

_LOG = logging.getLogger(__name__)
#: Who may call what, where the mesh has certificates: ranks for another node's group are started by nodes alone.
_CALLERS: Final = {
    "tensorway.v1.NodeService": frozenset({OPERATOR, WORKER, GATEWAY}), "tensorway.v1.NodeService/RunRanks": frozenset({WORKER}),
    "tensorway.v1.NodeService/AdaptModel": frozenset({OPERATOR}), **OPEN_TO_MEMBERS,
}
#: What is kept of the grace period, seconds or share, for what runs when others have taken over, or have not.
_KEPT_S: Final = 5.0
_KEPT_SHARE: Final = 0.3


class Node:
    """Implements `tensorway.service.Service`."""

    name = "node"
    reflected: tuple[str, ...] = ("tensorway.v1.NodeService",)

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._context: ServiceContext | None = None
        self._keeper: ReplicaKeeper | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._guests: GuestHost | None = None
        self._adaptations: AdaptationHost | None = None

    def server_tls(self, tls: MeshTls | None) -> ServerTls | None:
        return None if tls is None else tls.serve(_CALLERS)

    async def start(self, context: ServiceContext) -> None:
        directories = await asyncio.to_thread(offered_directories, self._settings)
        devices = DevicePool(cuda_devices())
        by_revision = {directory.spec.revision: directory for directory in directories}
        self._keeper = ReplicaKeeper(context.id, by_revision, self._settings, context.registry, devices, self._changed)
        self._guests = GuestHost(context.id, by_revision, self._settings, devices)
        self._guests.attach(context.server)
        self._adaptations = AdaptationHost(context.id, by_revision, self._settings, devices)
        self._adaptations.attach(context.server)
        NodeServicer(context.id, self._keeper.reports).attach(context.server)
        NodeCollector(self._keeper.reports, len(devices.devices), context.metrics)
        self._keeping = context.tasks.create_task(self._offer_and_keep(context.registry, directories, self._keeper), name="replicas")
        self._context = context
        self._changed()

    def _changed(self) -> None:
        """A group has come further, or ended."""
        if self._context is not None and self._keeper is not None and self._context.readiness != "draining":
            self._context.set_readiness(self._keeper.unreadiness)

    async def _offer_and_keep(self, registry: Registry, directories: tuple[ModelDirectory, ...], keeper: ReplicaKeeper) -> None:
        for directory in directories:
            await patiently(f"offering {directory.yaml.name}", partial(_publish, registry, directory))
        await keeper.run()

    async def bound(self, endpoint: str) -> None:
        """Nothing of its own: it accepts no links."""

    def registration(self, endpoint: str) -> Registration:
        return Registration(NODE, "", endpoint)

    async def drain(self, deadline: Deadline) -> None:
        """Ends the groups: each leader finishes the batches it has accepted. Ranks of other nodes' groups end at once, for these groups
        then form anew elsewhere."""
        if self._guests is not None:
            await self._guests.drain()
        if self._adaptations is not None:
            await self._adaptations.drain()
        if self._keeping is not None and self._keeper is not None:
            remaining_s = deadline.remaining_s()
            await self._keeper.hand_over(Deadline.after(remaining_s - min(_KEPT_S, _KEPT_SHARE * remaining_s)))
            self._keeping.cancel()
            await asyncio.wait((self._keeping,), timeout=deadline.remaining_s() + 5.0)

    async def stop(self) -> None:
        return


def offered_directories(settings: NodeSettings) -> tuple[ModelDirectory, ...]:
    """The model directories this node offers. Raises FailedPrecondition naming what is missing and the command that brings it."""
    models_dir = Path(settings.models_dir).resolve()
    directories = find_directories(models_dir)
    if settings.models:
        known = {directory.yaml.name for directory in directories}
        unknown = sorted(set(settings.models) - known)
        if unknown:
            raise FailedPrecondition(f"{models_dir}: no model named {', '.join(unknown)}; there are: {', '.join(sorted(known)) or 'none'}")
        directories = tuple(directory for directory in directories if directory.yaml.name in settings.models)
    if not directories:
        raise FailedPrecondition(f"{models_dir}: holds no model directory (one with a model.yaml)")
    if not cuda_devices() and (on_cuda := [directory.yaml.name for directory in directories if directory.yaml.device == "cuda"]):
        raise FailedPrecondition(
            f"model {', '.join(on_cuda)} wants `device: cuda` and this node has no CUDA device; "
            "leave it out with --models, or say `device: auto`"
        )
    for directory in directories:
        _check_parallel(directory, settings)
    for directory in directories:
        missing = directory.missing_files()
        if missing:
            raise FailedPrecondition(
                f"model {directory.yaml.name!r} lacks {', '.join(file.path for file in missing)}; run `tensorway models fetch {models_dir}`"
            )
    return directories


def _check_parallel(directory: ModelDirectory, settings: NodeSettings) -> None:
    """Refuses a group that this node can never form, whatever other nodes do."""
    parallel, name = directory.yaml.parallel, directory.yaml.name
    if parallel.nodes > 1 and not settings.rank_interface:
        raise FailedPrecondition(
            f"model {name!r} has `parallel.nodes: {parallel.nodes}`, and this node takes no part in groups over several nodes; set "
            "rank_interface to a network interface that is private to the mesh, or leave the model out with --models",
            field="rank_interface",
        )
    if settings.rank_interface and settings.rank_interface not in (names := [name for _, name in socket.if_nameindex()]):
        raise FailedPrecondition(
            f"rank_interface: this machine has no network interface {settings.rank_interface!r}; it has: {', '.join(names)}",
            field="rank_interface",
        )
    devices = () if directory.yaml.device == "cpu" else cuda_devices()
    if devices and parallel.custom > len(devices):
        raise FailedPrecondition(
            f"model {name!r} has `parallel.custom: {parallel.custom}` and this node has {len(devices)} CUDA devices; "
            "leave it out with --models", field="parallel.custom",
        )


async def _publish(registry: Registry, directory: ModelDirectory) -> None:
    """Makes the revision known, and wanted. The directory that was started last is the revision that serves."""
    spec = directory.spec
    await registry.write(revision_key(spec.model, spec.revision), encode_revision(spec))
    key = f"{DESIRED}{spec.model}"
    wish: dict[str, Any] = {}

    def change(document: bytes | None) -> bytes:
        nonlocal wish
        wish = first_wish(spec, document)  # anew: of an attempt that another was faster than, nothing stays
        return json.dumps(wish).encode()

    await amend(registry, key, change)
    _LOG.info("model offered", extra={"fields": {"model": spec.model, "revision": spec.revision[:12], "replicas": wish["replicas"]}})

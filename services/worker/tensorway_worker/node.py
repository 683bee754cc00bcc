"""The node as a service: offers its model directories, keeps its replicas running, and tells what they do."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

from tensorway.deadline import Deadline
from tensorway.errors import FailedPrecondition
from tensorway.model_directory import ModelDirectory, find_directories
from tensorway.registry.port import DESIRED, NODE, Registration, Registry
from tensorway.revisions import encode_revision, revision_key
from tensorway.service import ServiceContext
from tensorway_worker.devices import cuda_devices
from tensorway_worker.replicas import ReplicaKeeper
from tensorway_worker.servicer import NodeServicer
from tensorway_worker.settings import NodeSettings

_LOG = logging.getLogger(__name__)


class Node:
    """Implements `tensorway.service.Service`."""

    name = "node"
    reflected: tuple[str, ...] = ("tensorway.v1.NodeService",)

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._keeper: ReplicaKeeper | None = None
        self._keeping: asyncio.Task[None] | None = None

    async def start(self, context: ServiceContext) -> None:
        directories = await asyncio.to_thread(offered_directories, self._settings)
        for directory in directories:
            await _publish(context.registry, directory)
        self._keeper = ReplicaKeeper(context.id, directories, self._settings, context.registry)
        NodeServicer(self._keeper.reports).attach(context.server)
        self._keeping = context.tasks.create_task(self._keeper.run(), name="replicas")
        context.set_readiness(None)

    async def bound(self, endpoint: str) -> None:
        """Nothing of its own: it accepts no links."""

    def registration(self, endpoint: str) -> Registration:
        return Registration(NODE, "", endpoint)

    async def drain(self, deadline: Deadline) -> None:
        """Ends the groups: each leader finishes the batches it has accepted."""
        if self._keeping is not None:
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
    cut = [directory.yaml.name for directory in directories if directory.yaml.parallel.pipeline * directory.yaml.parallel.tensor > 1]
    if cut:
        raise FailedPrecondition(
            f"model {', '.join(cut)} asks for `parallel` above 1 x 1: a model cannot be cut over several ranks yet; leave `parallel` out"
        )
    for directory in directories:
        missing = directory.missing_files()
        if missing:
            raise FailedPrecondition(
                f"model {directory.yaml.name!r} lacks {', '.join(file.path for file in missing)}; run `tensorway models fetch {models_dir}`"
            )
    return directories


async def _publish(registry: Registry, directory: ModelDirectory) -> None:
    """Makes the revision known, and wanted. The directory that was started last is the revision that serves."""
    spec = directory.spec
    await registry.write(revision_key(spec.model, spec.revision), encode_revision(spec))
    wish = {"model": spec.model, "revision": spec.revision, "replicas": spec.num_replicas}
    await registry.write(f"{DESIRED}{spec.model}", json.dumps(wish).encode())
    _LOG.info("model offered", extra={"fields": {"model": spec.model, "revision": spec.revision[:12], "replicas": spec.num_replicas}})

"""What others can reach of a leader: links, Infer, health, reflection, and its row in the registry."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Final, Protocol

from tensorway.deadline import Deadline
from tensorway.endpoints import dialable
from tensorway.registry import open_registry
from tensorway.registry.patience import patiently, released
from tensorway.registry.port import GROUP, ORCHESTRATOR, Lease, Registration
from tensorway.signature import RevisionSpec
from tensorway.telemetry import ops_service
from tensorway.tls import OPEN_TO_MEMBERS, OPERATOR, open_mesh_tls
from tensorway.transport import HealthService, LinkServer, add_reflection, create_server
from tensorway.transport.port import Exchange, Server, ServerOptions
from tensorway_worker.rank.launch import RankLaunch

_LOG = logging.getLogger(__name__)

INFERENCE_SERVICE: Final = "tensorway.v1.InferenceService"
LINK_SERVICE: Final = "tensorway.v1.LinkService"
HEALTH_SERVICE: Final = "grpc.health.v1.Health"


#: Who may call what, where the mesh has certificates.
_CALLERS: Final = {LINK_SERVICE: frozenset({ORCHESTRATOR}), INFERENCE_SERVICE: frozenset({OPERATOR}), **OPEN_TO_MEMBERS}


class Service(Protocol):
    """What a leader does for others: batches (`leader.py`), or answers of tokens (`generating.py`)."""

    def attach(self, server: Server) -> None:
        """Adds its methods to a server that has not started."""

    def on_exchange(self, exchange: Exchange) -> None:
        """One request of an orchestrator."""

    async def start(self) -> None:
        """To be called once, before anybody can reach it."""

    async def drain(self, deadline: Deadline) -> int:
        """Refuses what is new and waits for what was accepted; returns how much of it is left at the deadline."""

    def close(self) -> None:
        """Ends its threads without waiting for them."""


class Operations(Protocol):
    """What a leader does for operators (`profiling.py`)."""

    def attach(self, server: Server) -> None:
        """Adds its methods to a server that has not started."""


class Endpoint:
    """The leader's server and lease."""

    def __init__(self, launch: RankLaunch, spec: RevisionSpec, service: Service, operations: Operations) -> None:
        self._launch = launch
        self._spec = spec
        self._service = service
        mesh_tls = open_mesh_tls(*launch.tls)
        self._tls = None if mesh_tls is None else mesh_tls.serve(_CALLERS)
        self._server = create_server(ServerOptions(launch.listen, launch.transport, launch.max_message_bytes, tls=self._tls))
        self._links = LinkServer(service.on_exchange, launch.max_message_bytes)
        self._links.attach(self._server)
        service.attach(self._server)
        operations.attach(self._server)
        self._health = HealthService((INFERENCE_SERVICE, LINK_SERVICE))
        self._health.attach(self._server)
        add_reflection(self._server, (INFERENCE_SERVICE, LINK_SERVICE, ops_service.SERVICE, HEALTH_SERVICE))
        self._registry = open_registry(launch.registry)
        self._lease: Lease | None = None

    async def open(self) -> str:
        """Binds, registers and serves; returns what others dial. Raises Unavailable or FailedPrecondition."""
        launch = self._launch
        await self._service.start()
        endpoint = dialable(await self._server.start(), launch.advertise_host)
        if launch.local_links:
            await self._links.listen_local(endpoint)
        metadata = {
            "model": launch.model,
            "revision": launch.revision,
            "epoch": str(launch.epoch),
            "node": launch.node,
            "max_rows": str(self._spec.batching.max_rows),
            "pid": str(os.getpid()),
            "capacity": str(self._spec.generation.max_sequences if self._spec.generation else self._spec.batching.max_rows),
        }
        if self._tls is not None:
            metadata["tls"] = self._tls.kind
        if launch.zone:
            metadata["zone"] = launch.zone
        self._show_health(True)
        registration = Registration(GROUP, launch.group, endpoint, metadata)
        self._lease = await patiently(f"registering {launch.group}", lambda: self._registry.register(registration))
        _LOG.info("serving", extra={"fields": {"endpoint": endpoint, "model": launch.model, "epoch": launch.epoch}})
        return endpoint

    async def drain(self, deadline: Deadline) -> None:
        """Health first, then the lease, then the work: nobody new is sent here while accepted batches finish."""
        self._show_health(False)
        if self._lease is not None:
            await released(self._lease)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._service.drain(deadline))
            tasks.create_task(self._links.drain(deadline))

    async def close(self) -> None:
        """Ends everything at once; harmless to repeat."""
        self._health.shutdown()
        await self._links.close()
        await self._server.stop(0.0)
        self._service.close()
        await self._registry.close()

    def _show_health(self, serving: bool) -> None:
        for name in ("", INFERENCE_SERVICE, LINK_SERVICE):
            self._health.set(name, serving)

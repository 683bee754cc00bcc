"""One way to start, serve, drain and stop, for every service.

    read settings → logs → registry → service.start → bind gRPC and ops HTTP → register → serve
    SIGTERM/SIGINT: health NOT_SERVING and lease released → service.drain within the grace period → service.stop → close
    a second signal: out at once, status 130

A service that loses one of its long-running tasks to an exception stops the same way, with status 1.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import uvloop
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from tensorway.config import ServiceSettings
from tensorway.deadline import Deadline
from tensorway.endpoints import dialable
from tensorway.errors import TensorwayError
from tensorway.registry import open_registry
from tensorway.registry.patience import patiently, released
from tensorway.registry.port import Lease, Registration, Registry
from tensorway.telemetry import ops_service
from tensorway.telemetry.logs import LogLevel, configure_logs
from tensorway.telemetry.ops import OpsServer, PageSource
from tensorway.telemetry.ops_metrics import MemberCollector
from tensorway.telemetry.ops_tls import CertificateCollector, ops_context
from tensorway.telemetry.tracing import NO_TRACER, TraceCollector, Tracer, open_tracer, service_resource
from tensorway.tls import MeshTls, ServerTls
from tensorway.transport import HealthService, add_reflection, create_server
from tensorway.transport.port import Server, ServerOptions

_LOG = logging.getLogger(__name__)
_EXIT_SECOND_SIGNAL: Final = 130
HEALTH_SERVICE: Final = "grpc.health.v1.Health"
#: What the last spans get to be exported, at least and at most, seconds; in between, what is left of the grace period.
_FLUSH_S: Final = (1.0, 5.0)


@dataclass(slots=True)
class ServiceContext:
    """What a running service is given."""

    name: str
    id: str
    server: Server
    registry: Registry
    #: Owns long-running tasks; an exception in one stops the service.
    tasks: asyncio.TaskGroup
    metrics: CollectorRegistry
    _on_readiness: Callable[[str | None], None]
    readiness: str | None = "starting"
    tracer: Tracer = NO_TRACER
    #: Further pages of the ops port, by path.
    pages: dict[str, PageSource] = field(default_factory=dict)

    def set_readiness(self, reason: str | None) -> None:
        """None = ready; otherwise one sentence why not. Drives grpc.health.v1 and /readyz."""
        if reason != self.readiness:
            self.readiness = reason
            self._on_readiness(reason)


class Service(Protocol):
    """What a service supplies to the lifecycle."""

    name: str
    #: Full names of its gRPC services, for reflection and health.
    reflected: tuple[str, ...]

    def server_tls(self, tls: MeshTls | None) -> ServerTls | None:
        """How its server shows itself and whom it lets in; `tls` is what this member holds. None: in the clear."""

    async def start(self, context: ServiceContext) -> None:
        """Adds handlers to `context.server` and starts its tasks. The server is bound after it returns."""

    async def bound(self, endpoint: str) -> None:
        """The server listens, and will be registered as `endpoint` next."""

    def registration(self, endpoint: str) -> Registration | None:
        """What to put into the registry once bound to `endpoint`."""

    async def drain(self, deadline: Deadline) -> None:
        """Accepts nothing new and finishes what runs. Health is NOT_SERVING and the lease is released by now."""

    async def stop(self) -> None:
        """Lets go of everything."""


def run_service(service: Service, settings: ServiceSettings, guard: Callable[[Server], Server] | None = None) -> int:
    """Runs until a signal; returns the exit status. `guard` puts something before every handler, health's and reflection's too."""
    instance = settings.id or f"{service.name}-{socket.gethostname()}-{os.getpid()}"
    configure_logs(service.name, instance, settings.log_level, settings.log_format)
    try:
        return uvloop.run(_Lifecycle(service, settings, instance, guard).run())
    except KeyboardInterrupt:
        return _EXIT_SECOND_SIGNAL


@dataclass(slots=True)
class _Lifecycle:
    """One run of one service."""

    service: Service
    settings: ServiceSettings
    instance: str
    guard: Callable[[Server], Server] | None
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _num_signals: int = 0
    #: None before the service is registered, and for one that never is.
    _lease: Lease | None = None
    _tracer: Tracer = NO_TRACER
    #: The end of the grace period, once it has begun.
    _drain_until: Deadline = field(default_factory=lambda: Deadline.after(0.0))

    async def run(self) -> int:
        self._install_signals()
        status = 0
        try:
            await self._serve()
        except* TensorwayError as group:
            for error in _leaves(group):
                print(f"tensorway {self.service.name}: {error}", file=sys.stderr)
            status = 1
        except* Exception as group:  # noqa: BLE001 - the last resort of the process: logged, and status 1
            for error in _leaves(group):
                _LOG.error("stopped by an unexpected error", exc_info=error)
            status = 1
        return status

    async def _serve(self) -> None:
        settings, service = self.settings, self.service
        registry = open_registry(settings.registry)
        mesh_tls = settings.mesh_tls
        tls = service.server_tls(mesh_tls)
        server = create_server(ServerOptions(settings.listen, settings.transport, settings.max_message_bytes, tls=tls))
        health = HealthService(("", *service.reflected))
        guarded = server if self.guard is None else self.guard(server)
        health.attach(guarded)
        ops_service.OpsServicer(LogLevel(settings.log_level)).attach(guarded)
        add_reflection(guarded, (*service.reflected, ops_service.SERVICE, HEALTH_SERVICE))
        metrics = CollectorRegistry()
        ProcessCollector(registry=metrics)
        PlatformCollector(registry=metrics)
        tracer = self._tracer = open_tracer(settings.tracing, service_resource(service.name, self.instance, settings.zone))
        TraceCollector(tracer, metrics)
        if mesh_tls is not None:
            CertificateCollector(mesh_tls.files, metrics)
        ops: OpsServer | None = None
        ops_tls = ops_context(settings.ops_tls, mesh_tls)
        try:
            async with asyncio.TaskGroup() as tasks:
                context = ServiceContext(
                    service.name, self.instance, guarded, registry, tasks, metrics, lambda reason: self._show_readiness(health, reason),
                    tracer=tracer,
                )
                MemberCollector(service.name, lambda: context.readiness is None, lambda: server.num_in_flight, metrics)
                await service.start(context)
                bound = dialable(await server.start(), settings.advertise_host)
                if settings.ops_listen != "off":
                    ops = OpsServer(settings.ops_listen, lambda: context.readiness, metrics, ops_tls, context.pages)
                    await ops.start()
                await service.bound(bound)
                registering = tasks.create_task(self._register(registry, bound, ops, tls), name="registration")
                _LOG.info("serving", extra={"fields": {"endpoint": bound, "ops": ops.endpoint if ops else "off", "pid": os.getpid()}})
                await self._stopping.wait()
                # A registry that is away keeps nobody from stopping.
                registering.cancel()
                await self._drain(context, server, health)
                tasks.create_task(_end_group())
        except* _Ended:
            pass
        finally:
            health.shutdown()
            await server.stop(0.0)
            await service.stop()
            if ops is not None:
                await ops.stop()
            await registry.close()
            await asyncio.to_thread(self._tracer.close, min(_FLUSH_S[1], max(_FLUSH_S[0], self._drain_until.remaining_s())))
            _LOG.info("stopped")

    async def _register(self, registry: Registry, bound: str, ops: OpsServer | None, tls: ServerTls | None) -> None:
        registration = self.service.registration(bound)
        if registration is None:
            return
        metadata = {"pid": str(os.getpid()), **registration.metadata}
        if tls is not None:
            metadata["tls"] = tls.kind
        if self.settings.zone:
            metadata["zone"] = self.settings.zone
        if ops is not None:
            metadata["ops"] = dialable(ops.endpoint, self.settings.advertise_host)
        full = Registration(registration.kind, registration.id or self.instance, registration.endpoint, metadata)
        self._lease = await patiently(f"registering {full.id}", lambda: registry.register(full))

    async def _drain(self, context: ServiceContext, server: Server, health: HealthService) -> None:
        """Health first, then the lease, then the work: nobody new is sent here while what runs is finished."""
        deadline = self._drain_until = Deadline.after(self.settings.drain_delay_s + self.settings.grace_s)
        _LOG.info("draining", extra={"fields": {"in_flight": server.num_in_flight, "grace_s": self.settings.grace_s}})
        context.set_readiness("draining")
        if self._lease is not None:
            await released(self._lease)
        # A proxy asks for health every second or so: what it sends meanwhile finds the door still open.
        await asyncio.sleep(self.settings.drain_delay_s)
        await self.service.drain(deadline)
        health.shutdown()  # an open Watch would hold the server for the whole grace
        await server.stop(max(0.0, deadline.remaining_s()))

    def _show_readiness(self, health: HealthService, reason: str | None) -> None:
        for name in ("", *self.service.reflected):
            health.set(name, reason is None)
        if reason is None:
            _LOG.info("ready")
        else:
            _LOG.warning("not ready: %s", reason)

    def _install_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        self._num_signals += 1
        if self._num_signals > 1:
            os._exit(_EXIT_SECOND_SIGNAL)
        self._stopping.set()


class _Ended(Exception):
    """Ends the task group once draining is over."""


async def _end_group() -> None:
    raise _Ended


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found

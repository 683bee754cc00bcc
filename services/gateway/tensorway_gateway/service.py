"""The gateway as a service: what it starts, registers and drains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorway.deadline import Deadline
from tensorway.errors import FailedPrecondition
from tensorway.registry.port import GATEWAY, Registration
from tensorway.service import ServiceContext
from tensorway.tls import MeshTls, ServerTls, TlsFiles
from tensorway.transport.port import Server
from tensorway_gateway.admission import Admission, Limits
from tensorway_gateway.catalog import Catalog
from tensorway_gateway.generation_path import GenerationPath
from tensorway_gateway.identity.access import Access
from tensorway_gateway.mesh_metrics import MeshCollector
from tensorway_gateway.path import RequestPath
from tensorway_gateway.servicers import generation, inference, mesh, model, oip
from tensorway_gateway.servicers.mesh_ops import MeshOperations
from tensorway_gateway.servicers.oip_models import OipModelServicer
from tensorway_gateway.servicers.oip_stream import OipStreamServicer
from tensorway_gateway.servicers.oip_unserved import attach_unserved
from tensorway_gateway.settings import GatewaySettings
from tensorway_gateway.statistics import Statistics, StatisticsCollector
from tensorway_gateway.status import Status
from tensorway_gateway.upstream import NO_ORCHESTRATOR, Upstream

if TYPE_CHECKING:
    from tensorway_gateway.identity.gate import Gate


class Gateway:
    """Implements `tensorway.service.Service`."""

    name = "gateway"
    reflected: tuple[str, ...] = (inference.SERVICE, model.SERVICE, mesh.SERVICE, oip.SERVICE)

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._context: ServiceContext | None = None
        self._catalog: Catalog | None = None
        self._upstream: Upstream | None = None
        self._is_draining = False
        #: None: everybody may do everything.
        self._gate: Gate | None = None

    def guard(self, server: Server) -> Server:
        """The server as every handler is to be added to it, the lifecycle's own too. Raises FailedPrecondition where the access file cannot
        be used."""
        settings = self._settings
        if not settings.access_file:
            return server
        # Cryptography is only loaded where somebody is to be known.
        from tensorway_gateway.identity.audit import AuditLog
        from tensorway_gateway.identity.gate import Gate
        from tensorway_gateway.identity.guarded import GuardedServer

        if self._gate is None:
            self._gate = Gate(settings.access_file, AuditLog(settings.audit_file))
        return server if isinstance(server, GuardedServer) else GuardedServer(server, self._gate)

    def server_tls(self, tls: MeshTls | None) -> ServerTls | None:
        """Clients are not members: they check the host's name, and show a certificate only where `client_ca` is set."""
        settings = self._settings
        if not settings.public_cert and tls is None:
            if settings.client_ca:
                raise FailedPrecondition("client_ca: the gateway has no certificate; set public_cert or tls_cert", field="client_ca")
            return None
        cert, key = settings.public_cert or settings.tls_cert, settings.public_key or settings.tls_key
        return ServerTls(TlsFiles(cert=cert, key=key, ca=settings.client_ca), requires_client=bool(settings.client_ca))

    async def start(self, context: ServiceContext) -> None:
        """Adds the dialects to the server and begins to follow the registry."""
        settings = self._settings
        self._context = context
        catalog = self._catalog = Catalog(context.registry, self._changed)
        upstream = self._upstream = Upstream(
            context.registry, settings.max_message_bytes, settings.orchestrator_wait_s, self._changed, settings.local_links,
            settings.mesh_tls,
        )
        admission = Admission(Limits(settings.max_in_flight_requests, settings.max_in_flight_bytes, settings.max_timeout_s))
        statistics = Statistics()
        StatisticsCollector(statistics, lambda: (admission.num_requests, admission.num_bytes), context.metrics)
        MeshCollector(catalog, upstream, context.metrics)
        context.pages |= Status(
            context.id, context.registry, catalog, upstream, admission, statistics, lambda: context.readiness
        ).pages()
        server = self.guard(context.server)
        access = Access(self._gate)
        if self._gate is not None:
            self._gate.register(context.metrics)
            context.tasks.create_task(self._gate.run(), name="identities")
        path = RequestPath(catalog, admission, upstream, statistics, context.tracer, access)
        generations = GenerationPath(catalog, admission, upstream, statistics, context.tracer, access)
        inference.InferenceServicer(path).attach(server)
        generation.GenerationServicer(generations).attach(server)
        model.ModelServicer(catalog, context.registry, access).attach(server)
        mesh.MeshServicer(context.registry, catalog, access).attach(server)
        MeshOperations(context.registry, catalog, settings.mesh_tls, access).attach(server)
        oip.OipServicer(path).attach(server)
        OipStreamServicer(path, generations).attach(server)
        OipModelServicer(catalog, statistics, lambda: self._unreadiness() is None, access).attach(server)
        attach_unserved(server)
        context.set_readiness(self._unreadiness())
        context.tasks.create_task(catalog.run(), name="catalog")
        context.tasks.create_task(upstream.run(), name="orchestrators")

    async def bound(self, endpoint: str) -> None:
        """Nothing of its own: it accepts no links."""

    def registration(self, endpoint: str) -> Registration:
        return Registration(GATEWAY, "", endpoint)

    async def drain(self, deadline: Deadline) -> None:
        """Nothing of its own: the server refuses new requests and waits for the running ones, whose links stay open until `stop`."""
        self._is_draining = True

    async def stop(self) -> None:
        """Its tasks belong to the service's task group, and have ended; what they had not written yet is written."""
        if self._gate is not None:
            self._gate.audit.flush()

    def _changed(self) -> None:
        """The catalog or a link changed."""
        if self._context is not None and not self._is_draining and self._context.readiness != "draining":
            self._context.set_readiness(self._unreadiness())

    def _unreadiness(self) -> str | None:
        """None while requests can be served, otherwise why not."""
        if self._is_draining:
            return "draining"
        if self._catalog is None or not self._catalog.is_known:
            return "the registry has not been read yet"
        return None if self._upstream is not None and self._upstream.has_connected else NO_ORCHESTRATOR

"""The gateway as a service: what it starts, registers and drains."""

from __future__ import annotations

from tensorway.deadline import Deadline
from tensorway.registry.port import GATEWAY, Registration
from tensorway.service import ServiceContext
from tensorway_gateway.admission import Admission, Limits
from tensorway_gateway.catalog import Catalog
from tensorway_gateway.generation_path import GenerationPath
from tensorway_gateway.path import RequestPath
from tensorway_gateway.servicers import generation, inference, mesh, model, oip
from tensorway_gateway.servicers.oip_models import OipModelServicer
from tensorway_gateway.servicers.oip_stream import OipStreamServicer
from tensorway_gateway.servicers.oip_unserved import attach_unserved
from tensorway_gateway.settings import GatewaySettings
from tensorway_gateway.statistics import Statistics, StatisticsCollector
from tensorway_gateway.upstream import NO_ORCHESTRATOR, Upstream


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

    async def start(self, context: ServiceContext) -> None:
        """Adds the dialects to the server and begins to follow the registry."""
        settings = self._settings
        self._context = context
        catalog = self._catalog = Catalog(context.registry, self._changed)
        upstream = self._upstream = Upstream(
            context.registry, settings.max_message_bytes, settings.orchestrator_wait_s, self._changed, settings.local_links
        )
        admission = Admission(Limits(settings.max_in_flight_requests, settings.max_in_flight_bytes, settings.max_timeout_s))
        statistics = Statistics()
        StatisticsCollector(statistics, lambda: (admission.num_requests, admission.num_bytes), context.metrics)
        path = RequestPath(catalog, admission, upstream, statistics)
        generations = GenerationPath(catalog, admission, upstream, statistics)
        inference.InferenceServicer(path).attach(context.server)
        generation.GenerationServicer(generations).attach(context.server)
        model.ModelServicer(catalog, context.registry).attach(context.server)
        mesh.MeshServicer(context.registry, catalog).attach(context.server)
        oip.OipServicer(path).attach(context.server)
        OipStreamServicer(path, generations).attach(context.server)
        OipModelServicer(catalog, statistics, lambda: self._unreadiness() is None).attach(context.server)
        attach_unserved(context.server)
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
        """Nothing of its own: its tasks belong to the service's task group."""

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

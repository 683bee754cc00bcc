"""The orchestrator as a service: what it starts, registers and drains."""

from __future__ import annotations

from typing import Final

from tensorway.deadline import Deadline
from tensorway.loads import LOADS
from tensorway.registry.leftovers import Leftovers
from tensorway.registry.port import GATEWAY, NODE, NODES, ORCHESTRATOR, Registration
from tensorway.service import ServiceContext
from tensorway.tls import OPEN_TO_MEMBERS, OPERATOR, MeshTls, ServerTls
from tensorway.transport import LinkServer
from tensorway_orchestrator.dispatcher import Dispatcher
from tensorway_orchestrator.load_board import LoadBoard
from tensorway_orchestrator.metrics import OrchestratorMetrics
from tensorway_orchestrator.pool import Group, GroupPool
from tensorway_orchestrator.pool_metrics import PoolCollector
from tensorway_orchestrator.roster_metrics import RosterCollector
from tensorway_orchestrator.scaler import Scaler
from tensorway_orchestrator.servicer import InferenceServicer
from tensorway_orchestrator.settings import OrchestratorSettings
from tensorway_orchestrator.shared_quarantine import SharedQuarantine

#: Who may call what, where the mesh has certificates.
_CALLERS: Final = {
    "tensorway.v1.LinkService": frozenset({GATEWAY}), "tensorway.v1.InferenceService": frozenset({OPERATOR}), **OPEN_TO_MEMBERS,
}
_NO_GROUP: Final = "no live worker group is connected"


class Orchestrator:
    """Implements `tensorway.service.Service`."""

    name = "orchestrator"
    reflected: tuple[str, ...] = ("tensorway.v1.InferenceService", "tensorway.v1.LinkService")

    def __init__(self, settings: OrchestratorSettings) -> None:
        self._settings = settings
        self._context: ServiceContext | None = None
        self._pool: GroupPool | None = None
        self._dispatcher: Dispatcher | None = None
        self._links: LinkServer | None = None

    def server_tls(self, tls: MeshTls | None) -> ServerTls | None:
        return None if tls is None else tls.serve(_CALLERS)

    async def start(self, context: ServiceContext) -> None:
        self._context = context
        metrics = OrchestratorMetrics(context.metrics)
        dispatcher = self._dispatcher = Dispatcher(self._settings, metrics, context.tracer)
        RosterCollector(dispatcher.rosters, context.metrics)
        self._links = LinkServer(dispatcher.on_exchange, self._settings.max_message_bytes)
        self._links.attach(context.server)
        InferenceServicer(dispatcher).attach(context.server)
        self._pool = GroupPool(
            context.registry, self._settings.max_message_bytes, self._group_changed, self._settings.local_links, self._settings.mesh_tls
        )
        PoolCollector(self._pool.groups, lambda: dispatcher.held_bytes, context.metrics)
        board = LoadBoard(
            context.id, context.registry, dispatcher.loads, dispatcher.called, lambda loads: metrics.loads(loads, dispatcher.wanted)
        )
        scaler = Scaler(context.id, context.registry, dispatcher.serving_specs)
        quarantine = SharedQuarantine(context.id, context.registry, dispatcher.quarantines)
        context.set_readiness(_NO_GROUP)
        context.tasks.create_task(dispatcher.follow_desired(context.registry, self._judge), name="desired state")
        context.tasks.create_task(dispatcher.follow_revisions(context.registry), name="revisions")
        context.tasks.create_task(self._pool.run(), name="groups")
        context.tasks.create_task(board.run(), name="load board")
        context.tasks.create_task(scaler.run(), name="scaler")
        context.tasks.create_task(quarantine.run(), name="quarantine")
        context.tasks.create_task(Leftovers(context.registry, NODES, NODE).run(), name="leftovers of nodes")
        context.tasks.create_task(Leftovers(context.registry, LOADS, ORCHESTRATOR).run(), name="leftovers of orchestrators")

    async def bound(self, endpoint: str) -> None:
        if self._settings.local_links and self._links is not None:
            await self._links.listen_local(endpoint)

    def registration(self, endpoint: str) -> Registration:
        return Registration(ORCHESTRATOR, "", endpoint)

    async def drain(self, deadline: Deadline) -> None:
        if self._links is not None:
            await self._links.drain(deadline)

    async def stop(self) -> None:
        if self._links is not None:
            await self._links.close()
        if self._dispatcher is not None:
            self._dispatcher.close()

    def _group_changed(self, group: Group, is_gone: bool) -> None:
        if self._dispatcher is not None:
            self._dispatcher.group_changed(group, is_gone)
            self._judge()

    def _judge(self) -> None:
        """Ready with a group, or with a model that gets one as soon as it is asked."""
        if self._dispatcher is None or self._pool is None or self._context is None or self._context.readiness == "draining":
            return
        can_serve = self._pool.num_connected or self._dispatcher.has_dormant
        self._context.set_readiness(None if can_serve else _NO_GROUP)

"""The replicas of this node: claims what falls to it, runs a supervisor for each claim, and publishes what becomes of them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from tensorway.deadline import Deadline
from tensorway.errors import TensorwayError
from tensorway.model_directory import ModelDirectory
from tensorway.registry.patience import released
from tensorway.registry.port import DESIRED, GROUP, NODE, NODES, ORCHESTRATOR, Lease, Registration, Registry
from tensorway_worker.devices import DevicePool
from tensorway_worker.group_report import GroupReport
from tensorway_worker.node_documents import NodeDocument, ranks_by_host, read_node_documents
from tensorway_worker.placement import Desired, Partner, Replica, partners_for, replica_to_move, replicas_to_claim, replicas_to_stop
from tensorway_worker.rank import launch as words
from tensorway_worker.settings import NodeSettings
from tensorway_worker.supervisor import GroupSupervisor

_LOG = logging.getLogger(__name__)
#: How soon the registry is asked again that was away, seconds.
_CLAIM_AGAIN_S: Final = 1.0
_ON_THE_WAY: Final = (words.STARTING, words.LOADING, words.WARMING)
#: How often a node asks itself whether it runs more replicas than its share, seconds.
_SPREAD_EVERY_S: Final = 10.0


@dataclass(slots=True)
class _View:
    """What the registry says."""

    desired: dict[str, Desired] = field(default_factory=dict)
    claims: dict[str, str] = field(default_factory=dict)
    #: Live nodes, and where their NodeService answers.
    nodes: dict[str, str] = field(default_factory=dict)
    offers: dict[str, frozenset[str]] = field(default_factory=dict)
    documents: dict[str, NodeDocument] = field(default_factory=dict)
    live_revisions: frozenset[str] = frozenset()
    #: Nodes with a live group, by revision.
    served_by: dict[str, frozenset[str]] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Running:
    """A claimed replica and what runs it."""

    lease: Lease
    supervisor: GroupSupervisor
    task: asyncio.Task[None]


class ReplicaKeeper:
    """Follows the registry and keeps this node's share of the replicas running."""

    def __init__(
        self, node: str, directories: Mapping[str, ModelDirectory], settings: NodeSettings, registry: Registry, devices: DevicePool,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`directories` are those that the node offers, by revision. `on_change` is called after every change of what `reports` says."""
        self._node = node
        self._directories = directories
        self._settings = settings
        self._registry = registry
        self._view = _View()
        self._changed = asyncio.Event()
        self._report_changed = asyncio.Event()
        self._running: dict[str, _Running] = {}
        self._on_change = on_change
        self._may_double = False
        self._is_leaving = False
        #: Whether it has looked at least once for what it should run.
        self._has_looked = False
        self._was_ready = False
        self._devices = devices

    def reports(self) -> tuple[GroupReport, ...]:
        return tuple(running.supervisor.report for running in self._running.values())

    async def run(self) -> None:
        """Until cancelled; then drains the groups and gives up the claims."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow_desired())
                tasks.create_task(self._follow_claims())
                tasks.create_task(self._follow_nodes())
                tasks.create_task(self._follow_offers())
                tasks.create_task(self._follow_groups())
                tasks.create_task(self._publish_reports())
                tasks.create_task(self._allow_doubling())
                tasks.create_task(self._spread())
                while True:
                    await self._changed.wait()
                    self._changed.clear()
                    await self._reconcile(tasks)
        finally:
            try:
                await self._registry.delete(f"{NODES}{self._node}")
            except TensorwayError as error:
                _LOG.warning("this node's document stays behind, which nobody minds: %s", error)

    @property
    def unreadiness(self) -> str | None:
        """None once all that the node claimed at its start has served (or has failed to start, which its readiness does not wait for), and
        ever after: what comes later comes to a node that serves."""
        if not self._has_looked:
            return "the registry has not been read yet"
        starting = [report.id for report in self.reports() if report.epoch <= 1 and report.state in _ON_THE_WAY]
        if starting and not self._was_ready:
            return f"starting: {', '.join(starting)}"
        self._was_ready = True
        return None

    async def hand_over(self, deadline: Deadline) -> None:
        """Before this node stops: lets others claim its replicas, and goes on with what nobody else serves yet, until `deadline`."""
        self._is_leaving = True
        for running in tuple(self._running.values()):
            await released(running.lease)
        try:
            if not await self._registry.registrations(ORCHESTRATOR):
                return  # the mesh ends: nobody is left to serve
            async with asyncio.timeout(max(0.0, deadline.remaining_s())):
                while self._is_needed():
                    self._changed.clear()
                    await self._changed.wait()
        except (TimeoutError, TensorwayError) as error:
            _LOG.warning("no other node has taken over in time: %s", error)

    def _is_needed(self) -> bool:
        """Whether a group serves here that another node could run and none does."""
        view = self._view
        others = view.nodes.keys() - {self._node}
        for running in self._running.values():
            revision = running.supervisor.replica.revision
            is_offered = any(revision in view.offers.get(node, frozenset()) for node in others)
            is_wanted = (wish := view.desired.get(running.supervisor.replica.model)) is not None and wish.revision == revision
            serves = running.supervisor.report.state == words.READY
            if serves and is_offered and is_wanted and not view.served_by.get(revision, frozenset()) - {self._node}:
                return True
        return False

    async def _reconcile(self, tasks: asyncio.TaskGroup) -> None:
        """Claims and starts what is missing, stops what is no longer wanted."""
        if self._is_leaving:
            return
        view = self._view
        offers = {node: view.offers.get(node, frozenset()) for node in view.nodes}
        offers[self._node] = frozenset(self._directories)
        for replica in replicas_to_claim(view.desired, view.claims, offers, self._node, self._may_double):
            if replica.key in self._running:
                continue
            try:
                lease = await self._registry.claim(replica.key, self._node)
            except TensorwayError as error:
                _LOG.warning("replica %s cannot be claimed now: %s", replica.key, error)
                asyncio.get_running_loop().call_later(_CLAIM_AGAIN_S, self._changed.set)
                break
            if lease is not None:
                self._start(replica, lease, tasks)
        running = tuple(entry.supervisor.replica for entry in self._running.values())
        for replica in replicas_to_stop(running, view.desired, view.live_revisions):
            self._running[replica.key].task.cancel()
        if not self._has_looked and view.desired and view.nodes:
            self._has_looked = True
            self._on_change()

    def _start(self, replica: Replica, lease: Lease, tasks: asyncio.TaskGroup) -> None:
        supervisor = GroupSupervisor(
            replica, self._directories[replica.revision], self._settings, self._node, self._devices, self._reported,
            self._partners,
        )
        task = tasks.create_task(self._supervise(replica, supervisor, lease), name=f"group {supervisor.report.id}")
        self._running[replica.key] = _Running(lease, supervisor, task)

    def _reported(self) -> None:
        self._report_changed.set()
        self._on_change()

    def _partners(self, replica: Replica) -> tuple[Partner, ...]:
        view = self._view
        return partners_for(replica, self._node, view.offers, view.nodes, ranks_by_host(view.documents, view.nodes))

    def _on_nodes(self) -> None:
        """What a group over several nodes lacked may have come."""
        self._changed.set()
        for running in self._running.values():
            if running.supervisor.directory.yaml.parallel.nodes > 1:
                running.supervisor.try_again()

    async def _supervise(self, replica: Replica, supervisor: GroupSupervisor, lease: Lease) -> None:
        _LOG.info("replica claimed", extra={"fields": {"model": replica.model, "replica": replica.index, "group": supervisor.report.id}})
        try:
            async with asyncio.TaskGroup() as own:
                losing = own.create_task(self._stop_when_lost(replica, lease))
                await supervisor.run()
                losing.cancel()
        finally:
            await asyncio.shield(released(lease))
            del self._running[replica.key]
            self._reported()
            self._changed.set()

    async def _stop_when_lost(self, replica: Replica, lease: Lease) -> None:
        """Another node has the claim, after an outage of the registry or a pause of this process: two would be one too many."""
        await lease.wait_lost()
        _LOG.warning("another node runs replica %s now; it ends here", replica.key)
        self._running[replica.key].task.cancel()

    async def _follow_desired(self) -> None:
        async for documents in self._registry.watch_documents(DESIRED):
            self._view.desired = _read_desired(documents)
            self._changed.set()

    async def _follow_claims(self) -> None:
        async for claims in self._registry.watch_claims(""):
            self._view.claims = dict(claims)
            self._changed.set()

    async def _follow_nodes(self) -> None:
        async for registrations in self._registry.watch(NODE):
            self._view.nodes = {registration.id: registration.endpoint for registration in registrations}
            self._on_nodes()

    async def _follow_offers(self) -> None:
        async for documents in self._registry.watch_documents(NODES):
            self._view.documents = read_node_documents(documents)
            offers = {node: document.revisions for node, document in self._view.documents.items()}
            if offers != self._view.offers:
                self._view.offers = offers
                self._on_nodes()
            if f"{NODES}{self._node}" not in documents:
                self._report_changed.set()  # another took it away while this node could not be seen

    async def _follow_groups(self) -> None:
        async for registrations in self._registry.watch(GROUP):
            self._view.live_revisions = frozenset(_revision(registration) for registration in registrations)
            self._view.served_by = {
                revision: frozenset(each.metadata.get("node", "") for each in registrations if _revision(each) == revision)
                for revision in self._view.live_revisions
            }
            self._changed.set()

    async def _allow_doubling(self) -> None:
        await asyncio.sleep(self._settings.spread_wait_s)
        self._may_double = True
        self._changed.set()

    async def _spread(self) -> None:
        """Gives a replica up where another node has had none for a while: one at a time, and only what serves."""
        while True:
            await asyncio.sleep(_SPREAD_EVERY_S)
            view = self._view
            offers = {node: view.offers.get(node, frozenset()) for node in view.nodes}
            key = replica_to_move(view.claims, offers, self._node)
            running = None if key is None else self._running.get(key)
            if running is not None and running.supervisor.report.state == words.READY:
                _LOG.info("replica %s moves to a node that has fewer", key)
                running.task.cancel()

    async def _publish_reports(self) -> None:
        """Writes the node's document at each change; changes that come while it is written join the next."""
        while True:
            document = {
                "node": self._node,
                "revisions": sorted(self._directories),
                "groups": [report.to_document() for report in self.reports()],
            }
            try:
                await self._registry.write(f"{NODES}{self._node}", json.dumps(document).encode())
            except TensorwayError as error:
                _LOG.warning("this node's document cannot be written now: %s", error)
                await asyncio.sleep(_CLAIM_AGAIN_S)
                continue
            await self._report_changed.wait()
            self._report_changed.clear()


def _revision(registration: Registration) -> str:
    return registration.metadata.get("revision", "")


def _read_desired(documents: Mapping[str, bytes]) -> dict[str, Desired]:
    desired: dict[str, Desired] = {}
    for key, document in documents.items():
        try:
            wish = json.loads(document)
            desired[wish["model"]] = Desired(wish["revision"], int(wish["replicas"]))
        except (ValueError, KeyError, TypeError) as error:
            _LOG.error("document %s is no desired state and is ignored: %s", key, error)
    return desired

"""The live groups: one link to each leader, opened and closed as the registry says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tensorway.errors import InternalError
from tensorway.registry.port import GROUP, Registration, Registry
from tensorway.tls import MeshTls
from tensorway.transport import create_link_client
from tensorway.transport.port import LinkClient
from tensorway_orchestrator.group_record import GroupRecord, SentBatch
from tensorway_orchestrator.roster import Roster

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Group:
    """A live group: its link, and its place in the roster of its lane."""

    #: Group id and epoch: a re-formed group is another one.
    id: str
    group: str
    model: str
    revision: str
    epoch: int
    node: str
    zone: str
    link: LinkClient
    is_leaving: bool = False
    #: Of its lane; None before there is one.
    roster: Roster | None = None
    record: GroupRecord | None = None
    num_in_flight: int = 0
    #: Since it was found.
    num_sent: int = 0
    has_idled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def lives(self) -> bool:
        """Whether it can be reached and will stay; it may rest, or be ejected."""
        return not self.is_leaving and self.link.is_connected

    @property
    def has_died(self) -> bool:
        """Whether its link broke, unannounced."""
        return not self.is_leaving and not self.link.is_connected

    def follow(self, roster: Roster) -> None:
        """Tells the roster how the group is, now that this has changed; joins it first where it is new there."""
        now_s = time.monotonic()
        if self.roster is not roster or self.record is None:
            self.roster, self.record = roster, roster.join(self.id, self.zone)
        if self.is_leaving:
            roster.leaving(self.record, now_s)
        elif self.link.is_connected:
            roster.opened(self.record, now_s)
        else:
            roster.closed(self.record, now_s)

    def part(self) -> None:
        """Leaves the roster."""
        if self.roster is not None and self.record is not None:
            self.roster.leave(self.record, time.monotonic())
        self.roster = self.record = None

    def begin(self, rows: int, now_s: float) -> Sending:
        """Something of `rows` rows is sent there. Raises InternalError outside of a lane."""
        if self.roster is None or self.record is None:
            raise InternalError(f"group {self.id} is in no lane's roster")
        self.num_in_flight += 1
        self.num_sent += 1
        self.has_idled.clear()
        return Sending(self, self.roster, self.roster.began(self.record, rows, now_s))


@dataclass(slots=True, eq=False)
class Sending:
    """What a group has been sent and has not answered. End it exactly once."""

    group: Group
    roster: Roster
    batch: SentBatch

    def end(self, now_s: float) -> None:
        """It is no longer with the group, whatever became of it."""
        self.roster.ended(self.batch, now_s)
        group = self.group
        group.num_in_flight -= 1
        if not group.num_in_flight:
            group.has_idled.set()


#: Told of every group that came, went, connected or broke.
GroupListener = Callable[[Group, bool], None]


class GroupPool:
    """Keeps one link to every registered group. `on_change(group, is_gone)` is called in the loop."""

    def __init__(
        self, registry: Registry, max_message_bytes: int, on_change: GroupListener, local_links: bool = True, tls: MeshTls | None = None
    ) -> None:
        self._tls = None if tls is None else tls.dial(GROUP)
        self._registry = registry
        self._max_message_bytes = max_message_bytes
        self._on_change = on_change
        self._local_links = local_links
        self._groups: dict[str, Group] = {}
        self._stops: dict[str, asyncio.Event] = {}

    @property
    def num_connected(self) -> int:
        return sum(1 for group in self._groups.values() if group.lives)

    def groups(self) -> tuple[Group, ...]:
        """Every live group."""
        return tuple(self._groups.values())

    async def run(self) -> None:
        """Follows the registry until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            async for registrations in self._registry.watch(GROUP):
                live = {_identity(registration): registration for registration in registrations}
                for identity in self._stops.keys() - live.keys():
                    self._stops.pop(identity).set()
                for identity in live.keys() - self._stops.keys():
                    self._stops[identity] = stop = asyncio.Event()
                    tasks.create_task(self._keep(identity, live[identity], stop), name=f"group {identity}")

    async def _keep(self, identity: str, registration: Registration, stop: asyncio.Event) -> None:
        """One group from its registration to its end."""

        def notice() -> None:
            self._on_change(group, False)

        link = create_link_client(registration.endpoint, self._max_message_bytes, notice, may_be_local=self._local_links, tls=self._tls)
        metadata = registration.metadata
        group = Group(
            identity, registration.id, metadata["model"], metadata["revision"], int(metadata["epoch"]), metadata.get("node", ""),
            metadata.get("zone", ""), link,
        )
        group.has_idled.set()
        self._groups[identity] = group
        try:
            _LOG.info("group found", extra={"fields": {"group": identity, "model": group.model, "endpoint": registration.endpoint}})
            self._on_change(group, False)
            async with asyncio.TaskGroup() as own:
                running = own.create_task(link.run(), name=f"link {identity}")
                await _until_unneeded(group, stop)
                running.cancel()
        finally:
            group.is_leaving = True
            del self._groups[identity]
            self._on_change(group, True)
            _LOG.info("group gone", extra={"fields": {"group": identity, "model": group.model}})


async def _until_unneeded(group: Group, stop: asyncio.Event) -> None:
    """Returns once the registration has gone and what the group was sent is answered (a broken link answers it too)."""
    await stop.wait()
    group.is_leaving = True
    await group.has_idled.wait()


def _identity(registration: Registration) -> str:
    return f"{registration.id}#{registration.metadata.get('epoch', '0')}"

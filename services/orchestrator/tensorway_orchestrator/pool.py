"""The live groups: one link to each leader, opened and closed as the registry says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from tensorway.registry.port import GROUP, Registration, Registry
from tensorway.transport import create_link_client
from tensorway.transport.port import LinkClient
from tensorway_orchestrator.batching import GroupLoad
from tensorway_orchestrator.routing import Candidate
from tensorway_orchestrator.step_times import StepTimes

_LOG = logging.getLogger(__name__)
_QUICKER: Final = 0.5
_SLOWER: Final = 0.01
#: Assumed way to a group and back until it has been measured, seconds.
_FIRST_LEAD_S: Final = 0.003


@dataclass(slots=True, eq=False)
class SentBatch:
    """A batch that a group has been sent and has not answered."""

    rows: int
    sent_s: float


@dataclass(slots=True, eq=False)
class Group:
    """A live group: its link, what it has been sent, and how fast it has been."""

    #: Group id and epoch: a re-formed group is another one.
    id: str
    group: str
    model: str
    revision: str
    epoch: int
    link: LinkClient
    step_times: StepTimes = field(default_factory=StepTimes)
    #: Time of a batch outside its step: the links, preparing, waiting for the loop.
    lead_s: float = _FIRST_LEAD_S
    in_flight: list[SentBatch] = field(default_factory=list)
    is_leaving: bool = False
    #: The leader has refused a batch: nothing is sent before this instant.
    rests_until_s: float = 0.0
    has_idled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def lives(self) -> bool:
        """Whether it can be reached and will stay; it may rest."""
        return not self.is_leaving and self.link.is_connected

    @property
    def can_take(self) -> bool:
        return self.lives and time.monotonic() >= self.rests_until_s

    def begin(self, rows: int, now_s: float) -> SentBatch:
        batch = SentBatch(rows, now_s)
        self.in_flight.append(batch)
        self.has_idled.clear()
        return batch

    def end(self, batch: SentBatch) -> None:
        self.in_flight.remove(batch)
        if not self.in_flight:
            self.has_idled.set()

    def observe(self, batch: SentBatch, step_s: float, wait_s: float, now_s: float) -> None:
        """Learns from an answered batch."""
        self.step_times.observe(batch.rows, step_s)
        # The way back is part of what is seen, and is slow whenever the next step keeps the cores busy: so the quickest ways count most.
        outside_s = max(0.0, now_s - batch.sent_s - step_s - wait_s)
        self.lead_s += (_QUICKER if outside_s < self.lead_s else _SLOWER) * (outside_s - self.lead_s)

    def predicted_idle_s(self) -> float:
        """When all that was sent is predicted to be done."""
        idle_s = 0.0
        for batch in self.in_flight:
            idle_s = max(idle_s, batch.sent_s) + self.step_times.predict_s(batch.rows)
        return idle_s

    def load(self) -> GroupLoad:
        running_rows = self.in_flight[-1].rows if self.in_flight else 0
        return GroupLoad(len(self.in_flight), running_rows, self.predicted_idle_s(), self.lead_s, self.step_times)

    def candidate(self) -> Candidate:
        return Candidate(self.id, len(self.in_flight), self.predicted_idle_s(), self.step_times)


#: Told of every group that came, went, connected or broke.
GroupListener = Callable[[Group, bool], None]


class GroupPool:
    """Keeps one link to every registered group. `on_change(group, is_gone)` is called in the loop."""

    def __init__(self, registry: Registry, max_message_bytes: int, on_change: GroupListener, local_links: bool = True) -> None:
        self._registry = registry
        self._max_message_bytes = max_message_bytes
        self._on_change = on_change
        self._local_links = local_links
        self._groups: dict[str, Group] = {}
        self._stops: dict[str, asyncio.Event] = {}

    @property
    def num_connected(self) -> int:
        return sum(1 for group in self._groups.values() if group.can_take)

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

        link = create_link_client(registration.endpoint, self._max_message_bytes, notice, may_be_local=self._local_links)
        metadata = registration.metadata
        group = Group(identity, registration.id, metadata["model"], metadata["revision"], int(metadata["epoch"]), link)
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

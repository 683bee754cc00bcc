"""The places of one revision: how many choices its groups can still take, and which of them takes the next."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tensorway_orchestrator.group_record import GroupRecord
from tensorway_orchestrator.group_wait import GroupWait
from tensorway_orchestrator.pool import Group
from tensorway_orchestrator.prefixes import Place, SeenPrefixes, choose_place
from tensorway_orchestrator.roster import Roster


@dataclass(slots=True, eq=False)
class GroupPlaces:
    """Lives in the loop; nothing here waits."""

    #: Choices that one group takes at once.
    limit: int
    #: How long is waited for a group while none lives, seconds.
    group_wait_s: float
    #: Where this orchestrator runs; "" for nowhere in particular.
    zone: str
    #: Called when a group may have room that it had not.
    on_room: Callable[[], None]
    #: Called once when no group has come in time.
    on_give_up: Callable[[], None]
    groups: dict[str, Group] = field(default_factory=dict)
    wait: GroupWait = field(init=False)
    roster: Roster = field(init=False)
    _seen: dict[str, SeenPrefixes] = field(default_factory=dict)
    _wake_timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.wait = GroupWait(self.group_wait_s, self.on_give_up)
        self.roster = Roster(1, random.randrange, max_in_flight=self.limit, zone=self.zone)

    @property
    def num_free(self) -> int:
        """Choices that could leave now."""
        return self.roster.num_free_places

    @property
    def num_places(self) -> int:
        """Free and taken, of the groups that live."""
        return self.limit * self.roster.num_live

    def changed(self, group: Group, is_gone: bool) -> None:
        """A group came, connected, broke, leaves or is gone."""
        if is_gone:
            self.groups.pop(group.id, None)
            self._seen.pop(group.id, None)
            group.part()
        else:
            self.groups[group.id] = group
            group.follow(self.roster)
        if self.roster.has_live:
            self.wait.found()
            self.on_room()
        else:
            self.wait.missing(is_registered=bool(self.groups))

    def choose(self, blocks: Sequence[bytes], avoid: Sequence[str]) -> Group | None:
        """The group that has least to do for a prompt of these blocks; None while none has room."""
        now_s = time.monotonic()
        record = self.roster.choose(1, avoid, now_s)
        if record is None:
            self._wake_at(self.roster.next_change_s(), now_s)
            return None
        records = {record.id: record, **self._holders(blocks, avoid)}
        places = [Place(id, len(each.in_flight), self._num_held(id, blocks)) for id, each in records.items()]
        chosen = choose_place(places, len(blocks), avoid, random.randrange)
        return self.groups[record.id if chosen is None else chosen.id]

    def sent(self, group: Group, blocks: Sequence[bytes]) -> None:
        """A group was sent a prompt of these blocks."""
        if group.id in self.groups:
            self._seen.setdefault(group.id, SeenPrefixes()).add(blocks)

    def rest(self, group: Group, rest_s: float, now_s: float) -> None:
        """A group takes nothing for a while."""
        if group.record is not None:
            self.roster.rests(group.record, now_s + rest_s, now_s)
        asyncio.get_running_loop().call_later(rest_s, self.on_room)

    def close(self) -> None:
        """Nothing is waited for any more."""
        self.wait.stop()
        if self._wake_timer is not None:
            self._wake_timer.cancel()

    def _holders(self, blocks: Sequence[bytes], avoid: Sequence[str]) -> dict[str, GroupRecord]:
        """Groups with room that have seen the beginning of the prompt."""
        if not blocks:
            return {}
        held = {id: self.roster.find(id) for id, seen in self._seen.items() if id not in avoid and seen.num_held(blocks[:1])}
        return {id: record for id, record in held.items() if record is not None and record.is_in_rotation and record.num_free_places > 0}

    def _num_held(self, id: str, blocks: Sequence[bytes]) -> int:
        seen = self._seen.get(id)
        return 0 if seen is None else seen.num_held(blocks)

    def _wake_at(self, instant_s: float, now_s: float) -> None:
        """Looks again when a group's rest or time out is over."""
        if self._wake_timer is not None:
            self._wake_timer.cancel()
            self._wake_timer = None
        if instant_s < float("inf"):
            self._wake_timer = asyncio.get_running_loop().call_later(max(0.0, instant_s - now_s), self.on_room)

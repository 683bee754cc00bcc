"""The places of one revision: how many choices its groups can still take, and which of them takes the next."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tensorway_orchestrator.group_wait import GroupWait
from tensorway_orchestrator.pool import Group
from tensorway_orchestrator.prefixes import Place, SeenPrefixes, choose_place


@dataclass(slots=True, eq=False)
class GroupPlaces:
    """Lives in the loop; nothing here waits."""

    #: Choices that one group takes at once.
    limit: int
    #: How long is waited for a group while none lives, seconds.
    group_wait_s: float
    #: Called when a group may have room that it had not.
    on_room: Callable[[], None]
    #: Called once when no group has come in time.
    on_give_up: Callable[[], None]
    groups: dict[str, Group] = field(default_factory=dict)
    _seen: dict[str, SeenPrefixes] = field(default_factory=dict)
    wait: GroupWait = field(init=False)

    def __post_init__(self) -> None:
        self.wait = GroupWait(self.group_wait_s, self.on_give_up)

    @property
    def num_free(self) -> int:
        return sum(max(0, self.limit - len(group.in_flight)) for group in self.groups.values() if group.can_take)

    @property
    def num_places(self) -> int:
        """Free and taken, of the groups that live."""
        return self.limit * sum(group.lives for group in self.groups.values())

    def changed(self, group: Group, is_gone: bool) -> None:
        """A group connected, broke, leaves or is gone."""
        if is_gone:
            self.groups.pop(group.id, None)
            self._seen.pop(group.id, None)
        else:
            self.groups[group.id] = group
        if not any(group.lives for group in self.groups.values()):
            self.wait.missing(is_registered=bool(self.groups))
            return
        self.wait.found()
        self.on_room()

    def choose(self, blocks: Sequence[bytes], avoid: Sequence[str]) -> Group | None:
        """The group that has least to do for a prompt of these blocks; None while none has room."""
        places = [
            Place(group.id, len(group.in_flight), seen.num_held(blocks) if (seen := self._seen.get(group.id)) else 0)
            for group in self.groups.values() if len(group.in_flight) < self.limit and group.can_take
        ]
        chosen = choose_place(places, len(blocks), avoid, random.randrange)
        return None if chosen is None else self.groups[chosen.id]

    def sent(self, group: Group, blocks: Sequence[bytes]) -> None:
        """A group was sent a prompt of these blocks."""
        if group.id in self.groups:
            self._seen.setdefault(group.id, SeenPrefixes()).add(blocks)

    def rest(self, group: Group, rest_s: float, now_s: float) -> None:
        """A group takes nothing for a while."""
        group.rests_until_s = max(group.rests_until_s, now_s + rest_s)
        asyncio.get_running_loop().call_later(rest_s, self.on_room)

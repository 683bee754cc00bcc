"""The routers that the routing benchmark compares: the orchestrator's own, and what load balancers do elsewhere."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.sim_world import MAX_ROWS, SimGroup, SimRequest
from tensorway_orchestrator.group_record import GroupRecord, SentBatch
from tensorway_orchestrator.roster import Roster
from tensorway_orchestrator.routing import MAX_BATCHES_IN_FLIGHT
from tensorway_orchestrator.routing_policy import RoutingPolicy
from tensorway_orchestrator.standing import Failure


def picker(source: random.Random) -> Callable[[int], int]:
    """Random integers below n; quicker than `randrange`."""
    draw = source.random
    return lambda n: int(draw() * n)


class Ours:
    """The orchestrator's roster, as a lane uses it. Implements `benchmarks.sim_world.Router`."""

    def __init__(self, source: random.Random, policy: RoutingPolicy, zone: str) -> None:
        self.roster = Roster(max_rows=MAX_ROWS, pick=picker(source), zone=zone, policy=policy)
        self._records: dict[int, GroupRecord] = {}
        self._indexes: dict[GroupRecord, int] = {}

    def choose(self, request: SimRequest, now_s: float) -> int | None:
        record = self.roster.choose(request.rows, [str(index) for index in request.avoid] if request.avoid else (), now_s)
        return None if record is None else self._indexes[record]

    def began(self, group: SimGroup, request: SimRequest, now_s: float) -> object:
        return self.roster.began(self._records[group.index], request.rows, now_s)

    def answered(self, ticket: object, step_s: float, now_s: float) -> None:
        assert isinstance(ticket, SentBatch)
        self.roster.ended(ticket, now_s)
        # What it waited at the leader is not known here; the way is a small part of it.
        self.roster.observed(ticket, step_s, max(0.0, now_s - ticket.sent_s - step_s - 0.002), now_s)

    def lost(self, ticket: object, now_s: float, *, is_timeout: bool) -> None:
        assert isinstance(ticket, SentBatch)
        self.roster.ended(ticket, now_s)
        self.roster.failed(ticket, Failure.TIMEOUT if is_timeout else Failure.LOST, now_s)

    def link(self, group: SimGroup, now_s: float, *, is_up: bool) -> None:
        record = self._records.get(group.index)
        if record is None:
            record = self._records[group.index] = self.roster.join(str(group.index), group.zone, has_history=True)
            self._indexes[record] = group.index
        if is_up:
            self.roster.opened(record, now_s)
        else:
            self.roster.closed(record, now_s)


@dataclass
class Rival:
    """Sends every request at once, to any group whose link is up; groups keep what waits. Implements `benchmarks.sim_world.Router`."""

    source: random.Random
    up: list[int] = field(default_factory=list)
    in_flight: dict[int, int] = field(default_factory=dict)

    def choose(self, request: SimRequest, now_s: float) -> int | None:
        for _ in range(20):
            index = self._next()
            if index not in request.avoid:
                return index
        return index

    def began(self, group: SimGroup, request: SimRequest, now_s: float) -> object:
        self.in_flight[group.index] += 1
        return group.index

    def answered(self, ticket: object, step_s: float, now_s: float) -> None:
        assert isinstance(ticket, int)
        self.in_flight[ticket] -= 1

    def lost(self, ticket: object, now_s: float, *, is_timeout: bool) -> None:
        assert isinstance(ticket, int)
        self.in_flight[ticket] -= 1

    def link(self, group: SimGroup, now_s: float, *, is_up: bool) -> None:
        self.in_flight.setdefault(group.index, 0)
        if is_up:
            self.up.append(group.index)
        else:
            self.up.remove(group.index)

    def _next(self) -> int:
        raise NotImplementedError


class RoundRobin(Rival):
    """One after the other."""

    _turn = 0

    def _next(self) -> int:
        self._turn += 1
        return self.up[self._turn % len(self.up)]


class Chance(Rival):
    """Any."""

    def _next(self) -> int:
        return self.source.choice(self.up)


class LeastConnections(Rival):
    """Of two drawn at random, the one with fewer requests in flight."""

    def _next(self) -> int:
        one, other = self.source.choice(self.up), self.source.choice(self.up)
        return one if self.in_flight[one] <= self.in_flight[other] else other


class FewConnections(LeastConnections):
    """The same, but no group gets more than two at once; requests wait for room."""

    def choose(self, request: SimRequest, now_s: float) -> int | None:
        for _ in range(10):
            index = self._next()
            if self.in_flight[index] < MAX_BATCHES_IN_FLIGHT and index not in request.avoid:
                return index
        return None

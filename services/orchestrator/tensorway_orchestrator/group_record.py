"""What the router knows of one group: what it has been sent, how fast it has been, and how it stands. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from tensorway_orchestrator.batching import GroupLoad
from tensorway_orchestrator.routing_policy import RoutingPolicy
from tensorway_orchestrator.standing import Standing, State
from tensorway_orchestrator.step_times import StepTimes
from tensorway_orchestrator.urn import Urn

_QUICKER: Final = 0.5
_SLOWER: Final = 0.01
#: Assumed way to a group and back until it has been measured, seconds.
_FIRST_LEAD_S: Final = 0.003
#: Every failure in a row doubles what is predicted, up to this many times: a group that fails at once is always idle, and would draw all.
_MAX_DOUBLINGS: Final = 4


class Reading(StrEnum):
    """What a group is doing, for people and metrics."""

    #: Its link is down.
    CLOSED = "closed"
    #: It drains.
    LEAVING = "leaving"
    #: Its leader is full.
    RESTING = "resting"
    #: Serves a growing share.
    WARMING = "warming"
    SERVING = "serving"
    EJECTED = "ejected"
    PROBING = "probing"


@dataclass(slots=True, eq=False)
class SentBatch:
    """A batch that a group has been sent and has not answered."""

    record: GroupRecord
    rows: int
    sent_s: float
    #: Predicted time of its step; 0 while nothing is measured.
    step_s: float
    #: When its answer was predicted to be here, on the monotonic clock.
    due_s: float
    #: It has counted against its group already.
    has_failed: bool = False


@dataclass(slots=True, eq=False)
class GroupRecord:
    """One group of a revision, as its roster sees it. Changed by the roster alone; everyone may read."""

    id: str
    zone: str
    policy: RoutingPolicy
    standing: Standing
    #: What the revision's groups have measured together; shared by all records of a roster.
    typical: StepTimes
    step_times: StepTimes = field(default_factory=StepTimes)
    #: Time of a batch outside its step: the links, preparing, waiting for the loop.
    lead_s: float = _FIRST_LEAD_S
    #: Whether its share grows slowly when its link comes up.
    starts_slowly: bool = True
    is_open: bool = False
    is_leaving: bool = False
    #: The leader has refused a batch: nothing is sent before this instant.
    rests_until_s: float = 0.0
    #: When its slow start began; minus infinity for none.
    ramps_from_s: float = -math.inf
    #: In the order in which they were sent.
    in_flight: dict[SentBatch, None] = field(default_factory=dict)
    #: Set by the roster: whether it counts as live, whether batches may go there, and the urn that it lies in.
    is_live: bool = False
    is_in_rotation: bool = False
    urn: Urn[GroupRecord] | None = None
    #: Set by the roster: batches more that it takes in ordinary service.
    num_free_places: int = 0
    #: Set by the forecast: rows a second that it serves in full batches.
    rows_per_s: float = 0.0
    #: Set by the forecast: which of its entries for the group counts.
    idle_entry: int = -1
    #: Since when the oldest batch in flight has been running, and the predicted steps of all.
    _runs_since_s: float = 0.0
    _in_flight_s: float = 0.0

    @property
    def times(self) -> StepTimes:
        """Its own step times, or the revision's while it has none."""
        return self.step_times if self.step_times.num_samples else self.typical

    @property
    def predicted_idle_s(self) -> float:
        """When all that it was sent is predicted to be done, on the monotonic clock; 0 while idle."""
        return self._runs_since_s + self._in_flight_s if self.in_flight else 0.0

    @property
    def awaits_probe(self) -> bool:
        """True while it is probing, no probe is on its way, and nothing is stuck there: what is stuck shows that it does not work."""
        since_s = self.standing.since_s
        return self.standing.state is State.PROBING and not any(
            batch.has_failed or batch.sent_s >= since_s for batch in self.in_flight
        )

    def reading(self, now_s: float) -> Reading:
        """For people and metrics."""
        if self.is_leaving or not self.is_open:
            return Reading.LEAVING if self.is_leaving else Reading.CLOSED
        if self.standing.state is not State.SERVING:
            return Reading.EJECTED if self.standing.state is State.EJECTED else Reading.PROBING
        if now_s < self.rests_until_s:
            return Reading.RESTING
        return Reading.SERVING if self.share(now_s) >= 1.0 else Reading.WARMING

    def load(self) -> GroupLoad:
        """The group as `batching` sees it."""
        running_rows = next(reversed(self.in_flight)).rows if self.in_flight else 0
        return GroupLoad(len(self.in_flight), running_rows, self.predicted_idle_s, self.lead_s, self.times)

    def wait_s(self, now_s: float) -> float:
        """How long a batch sent now would wait there. What is late will be as late again: the longer a step has been overdue, the more
        likely it is that the group hangs."""
        if not self.in_flight:
            return 0.0
        wait_s = self._runs_since_s + self._in_flight_s - now_s
        return wait_s if wait_s >= 0.0 else max(0.0, -wait_s - self.lead_s)

    def earliest_s(self, rows: int, now_s: float) -> float:
        """When the answer to a batch of `rows` sent now can be expected at the earliest, on the monotonic clock. A request whose deadline
        is before that is not worth its place in the batch."""
        return now_s + self.wait_s(now_s) + self.times.least_s(rows) + self.lead_s

    def cost_s(self, rows: int, now_s: float) -> float:
        """From now to the predicted finish of a batch of `rows` sent now, seconds; longer while the group warms up or fails."""
        cost_s = (self.step_times if self.step_times.num_samples else self.typical).predict_s(rows)
        if self.in_flight:
            cost_s += self.wait_s(now_s)
        if self.standing.num_failures:
            cost_s *= 2 ** min(_MAX_DOUBLINGS, self.standing.num_failures)
        return cost_s if now_s - self.ramps_from_s >= self.policy.slow_start_s else cost_s / self.share(now_s)

    def share(self, now_s: float) -> float:
        """The share of a normal group's load that it should get while it warms up; 1 once it is warm."""
        policy = self.policy
        if policy.slow_start_s <= 0.0:
            return 1.0
        return min(1.0, max(policy.first_share, (now_s - self.ramps_from_s) / policy.slow_start_s))

    def begin(self, rows: int, now_s: float) -> SentBatch:
        """Counts a batch in."""
        step_s = self.times.predict_s(rows)
        batch = SentBatch(self, rows, now_s, step_s, now_s + self.wait_s(now_s) + step_s + self.lead_s)
        if not self.in_flight:
            self._runs_since_s = now_s
        self.in_flight[batch] = None
        self._in_flight_s += step_s
        return batch

    def end(self, batch: SentBatch, now_s: float) -> None:
        """Counts a batch out, whatever became of it. Raises KeyError where it was counted out already."""
        was_running = next(iter(self.in_flight)) is batch if self.in_flight else False
        del self.in_flight[batch]
        self._in_flight_s -= batch.step_s
        if not self.in_flight:
            self._in_flight_s = 0.0
        elif was_running:
            # The next one has been running for as long as the answer was on its way, at most since it was sent.
            self._runs_since_s = max(next(iter(self.in_flight)).sent_s, now_s - self.lead_s)

    def observe(self, batch: SentBatch, step_s: float, wait_s: float, now_s: float) -> None:
        """Learns from an answered batch: its step took `step_s` after it had waited `wait_s` at the leader."""
        if not self.step_times.num_samples:
            self.step_times.seed(self.typical, self.policy.seed_steps)
        self.step_times.observe(batch.rows, step_s)
        # The way back is part of what is seen, and is slow whenever the next step keeps the cores busy: so the quickest ways count most.
        outside_s = max(0.0, now_s - batch.sent_s - step_s - wait_s)
        self.lead_s += (_QUICKER if outside_s < self.lead_s else _SLOWER) * (outside_s - self.lead_s)

"""The groups of one revision as the router sees them. Pure: every method takes `now_s` and costs the same whatever the number of groups.

A lane calls `join` when the registry names a group, `opened` and `closed` as its link comes and goes, `leaving` when its registration has
gone, and `leave` at the end. Around each batch: `choose`, `began`, then `ended` exactly once, and what came of it: `observed` or
`answered`, `failed`, or nothing at all where it says nothing about the group (cancelled, refused because the leader is full).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from tensorway_orchestrator.forecast import Forecast
from tensorway_orchestrator.group_record import GroupRecord, SentBatch
from tensorway_orchestrator.rotation import Rotation
from tensorway_orchestrator.routing import MAX_BATCHES_IN_FLIGHT, soonest
from tensorway_orchestrator.routing_policy import RoutingPolicy
from tensorway_orchestrator.standing import Failure, Reason, Standing, State

#: Fineness of the random part of a back-off.
_DRAWS: Final = 1 << 16
_LEAD_WEIGHT: Final = 0.02


@dataclass(slots=True, eq=False)
class Roster:
    """Of one lane. Not thread-safe; `now_s` is the monotonic clock and never goes back."""

    #: Most rows of a batch; 1 where batches hold one request each, and rows ahead are then counted in requests.
    max_rows: int
    #: Returns a random integer below its argument, e.g. `random.randrange`.
    pick: Callable[[int], int]
    #: Batches (of a lane that generates: choices) that one group has at once.
    max_in_flight: int = MAX_BATCHES_IN_FLIGHT
    #: The zone of this orchestrator; "" for none. A group without a zone is never far.
    zone: str = ""
    policy: RoutingPolicy = field(default_factory=RoutingPolicy)
    #: Ejections by reason, since the beginning.
    ejections: dict[Reason, int] = field(default_factory=lambda: dict.fromkeys(Reason, 0))
    forecast: Forecast = field(init=False)
    rotation: Rotation = field(init=False)
    _records: dict[str, GroupRecord] = field(default_factory=dict)
    #: (instant, order, group): when a back-off or a rest may be over.
    _wakes: list[tuple[float, int, GroupRecord]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=count)
    #: Batches since the last probe.
    _num_since_probe: int = 0
    #: Mean time of a batch outside its step.
    _lead_s: float = 0.0

    def __post_init__(self) -> None:
        self.forecast = Forecast(self.max_rows)
        self.rotation = Rotation(self.max_in_flight, self.zone, self.forecast, self._records)
        self._num_since_probe = self.policy.ejection.probe_gap

    def __iter__(self) -> Iterator[GroupRecord]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    @property
    def has_live(self) -> bool:
        """Whether the link of any group is up that is not leaving. One that rests or is ejected lives."""
        return self.rotation.num_live > 0

    @property
    def num_live(self) -> int:
        return self.rotation.num_live

    @property
    def num_free(self) -> int:
        """Groups that a batch may go to now, probes apart."""
        return self.rotation.num_free

    @property
    def num_free_places(self) -> int:
        """Batches that may leave now, probes apart."""
        return self.rotation.num_free_places

    @property
    def num_ejected(self) -> int:
        """Live groups that are left out, or get one batch at a time to see whether they are well again; never all live groups."""
        return len(self.rotation.left_out)

    def find(self, id: str) -> GroupRecord | None:
        """The group of that id, if it has joined."""
        return self._records.get(id)

    def next_change_s(self) -> float:
        """When a group's rest or back-off is over, and a batch that waits might leave; infinity where no such instant is known."""
        while self._wakes:
            wake_s, _, record = self._wakes[0]
            if self._is_known(record) and wake_s in (record.rests_until_s, record.standing.back_s):
                return wake_s
            heapq.heappop(self._wakes)
        return math.inf

    def join(self, id: str, zone: str = "", *, has_history: bool = False) -> GroupRecord:
        """A group is known; nothing is sent there before `opened`. One without a history, served here or elsewhere, starts slowly.

        Raises ValueError where it has joined already.
        """
        if id in self._records:
            raise ValueError(f"group {id!r} has joined already; a re-formed group has another epoch in its id")
        record = GroupRecord(id, zone, self.policy, Standing(self.policy.ejection), self.forecast.typical, starts_slowly=not has_history)
        self._records[id] = record
        return record

    def leave(self, record: GroupRecord, now_s: float) -> None:
        """The group is gone. What it still has in flight is ended as usual."""
        record.is_leaving, record.is_open = True, False
        self.rotation.place(record, now_s)
        self._records.pop(record.id, None)
        self._keep_bound(now_s)

    def opened(self, record: GroupRecord, now_s: float) -> None:
        """Its link is up."""
        if not record.is_open:
            record.is_open = True
            if record.starts_slowly:
                record.ramps_from_s = now_s
            record.starts_slowly = True  # when it comes back
            self.rotation.place(record, now_s)
            self._keep_bound(now_s)

    def closed(self, record: GroupRecord, now_s: float) -> None:
        """Its link is down."""
        record.is_open = False
        self.rotation.place(record, now_s)
        self._keep_bound(now_s)

    def leaving(self, record: GroupRecord, now_s: float) -> None:
        """It drains: it answers what it has and gets nothing new."""
        record.is_leaving = True
        self.rotation.place(record, now_s)
        self._keep_bound(now_s)

    def rests(self, record: GroupRecord, until_s: float, now_s: float) -> None:
        """Its leader is full: nothing is sent there before `until_s`. It stays live."""
        record.rests_until_s = max(record.rests_until_s, until_s)
        self._wake_at(record.rests_until_s, record)
        self.rotation.place(record, now_s)

    def choose(self, rows: int, avoid: Collection[str], now_s: float) -> GroupRecord | None:
        """The group for a batch of `rows` that leaves now, or None while it must wait.

        Groups whose ids are in `avoid` (they failed these requests) are never taken while another live group that is not ejected exists,
        even if that one is full now. A batch that avoids nothing may be a probe.
        """
        self._advance(now_s)
        rotation = self.rotation
        if not avoid and len(rotation.probes) and (self._num_since_probe >= self.policy.ejection.probe_gap or not rotation.num_free):
            return rotation.probes.draw(1, self.pick)[0]
        chosen = soonest(rotation.own, rotation.others, rows, avoid, now_s, self.policy, self.pick)
        if chosen is None and avoid and rotation.num_free and not self._has_other(avoid):
            chosen = soonest(rotation.own, rotation.others, rows, (), now_s, self.policy, self.pick)
        return chosen

    def began(self, record: GroupRecord, rows: int, now_s: float) -> SentBatch:
        """A batch of `rows` is sent to the group."""
        self._num_since_probe = 0 if record.standing.state is State.PROBING else self._num_since_probe + 1
        batch = record.begin(rows, now_s)
        self.rotation.loaded(record, now_s)
        return batch

    def ended(self, batch: SentBatch, now_s: float) -> None:
        """The batch is no longer with its group, whatever became of it. Raises KeyError where it was ended before."""
        batch.record.end(batch, now_s)
        self.rotation.loaded(batch.record, now_s)

    def observed(self, batch: SentBatch, step_s: float, wait_s: float, now_s: float) -> None:
        """The group answered: the step took `step_s`, after the batch had waited `wait_s` at the leader. Before or after `ended`."""
        record, forecast = batch.record, self.forecast
        if record.is_in_rotation:
            forecast.exit(record)
        reason = self._judged(batch, step_s, now_s)
        if record.standing.is_probe(batch.sent_s):
            record.step_times.clear()  # they may be those of its illness
        record.observe(batch, step_s, wait_s, now_s)
        self._lead_s += _LEAD_WEIGHT * (record.lead_s - self._lead_s)
        if record.is_in_rotation:
            forecast.enter(record)
        if reason is None or not self._eject(record, reason, now_s):
            self.answered(batch, now_s)

    def answered(self, batch: SentBatch, now_s: float) -> None:
        """The group answered, and its time says nothing about that of a step. Not after `observed`, which says so too."""
        if not batch.has_failed and batch.record.standing.answered(batch.sent_s, now_s):
            self._admit(batch.record, now_s)

    def failed(self, batch: SentBatch, failure: Failure, now_s: float) -> None:
        """The batch came to nothing, and the group may be to blame. Before or after `ended`; a second time changes nothing."""
        policy = self.policy.ejection
        if batch.has_failed:
            return
        if failure is Failure.TIMEOUT:
            limit_s = policy.timeout_factor * (batch.due_s - batch.sent_s) if batch.step_s > 0.0 else policy.first_timeout_s
            if now_s - batch.sent_s < limit_s:
                return
        batch.has_failed = True
        reason = batch.record.standing.failed(batch.sent_s, now_s)
        if reason is not None:
            self._eject(batch.record, reason, now_s)

    def predict_finish_s(self, rows_ahead: int, rows: int, now_s: float, overtaking_per_s: float = 0.0) -> float | None:
        """When a request of `rows` that joins behind `rows_ahead` rows would be answered, while `overtaking_per_s` rows a second of higher
        priority arrive (see `overtaking`). None while too little is measured to say, or no group is in rotation."""
        self._advance(now_s)
        if self.forecast.typical.num_samples < self.policy.min_samples:
            return None
        parts = self.forecast.wait_and_step_s(rows_ahead, rows, overtaking_per_s)
        first_s = now_s if self.rotation.num_idle else self.forecast.first_idle_s(now_s)
        return None if parts is None else first_s + sum(parts) + self._lead_s

    def _judged(self, batch: SentBatch, step_s: float, now_s: float) -> Reason | None:
        """Why a step of that time should cost the group its place. Called while the group is out of the forecast, so that what is left
        there is what the others have measured."""
        policy, typical, record = self.policy.ejection, self.forecast.typical, batch.record
        if typical.num_samples < policy.min_other_samples:
            return None
        ratio = step_s / (typical.predict_s(batch.rows) + policy.slow_slack_s)
        return record.standing.measured(ratio, self.forecast.mean_slowness, batch.sent_s, is_warming=record.share(now_s) < 1.0)

    def _has_other(self, avoid: Collection[str]) -> bool:
        """Whether a live group that is not ejected exists outside `avoid`."""
        avoided = sum(1 for id in set(avoid) if (record := self._records.get(id)) is not None and record.is_in_rotation)
        return self.forecast.num_groups > avoided

    def _eject(self, record: GroupRecord, reason: Reason, now_s: float) -> bool:
        """Leaves the group out, unless too many are already. A probing group is left out anyway."""
        num_live = self.num_live + (not record.is_live)
        is_refused = record not in self.rotation.left_out and self.num_ejected >= self._bound(num_live)
        if is_refused or not self._is_known(record):
            return False
        record.standing.eject(self.pick(_DRAWS) / _DRAWS, now_s)
        self.ejections[reason] += 1
        self._wake_at(record.standing.back_s, record)
        self.rotation.place(record, now_s)
        return True

    def _admit(self, record: GroupRecord, now_s: float) -> None:
        """Lets the group serve again, slowly at first."""
        record.standing.admit(now_s)
        record.ramps_from_s = now_s
        self.rotation.place(record, now_s)

    def _bound(self, num_live: int) -> int:
        """How many of so many live groups may be left out."""
        return max(0, min(num_live - 1, int(self.policy.ejection.max_ejected_share * num_live)))

    def _keep_bound(self, now_s: float) -> None:
        """Groups came or went: where too many are left out now, those whose back-off is over first serve again."""
        while self.num_ejected > self._bound(self.num_live):
            self._admit(min(self.rotation.left_out, key=lambda record: record.standing.back_s), now_s)

    def _advance(self, now_s: float) -> None:
        """Takes note of rests and back-offs that are over."""
        while self._wakes and self._wakes[0][0] <= now_s:
            record = heapq.heappop(self._wakes)[2]
            standing = record.standing
            if standing.state is State.EJECTED and standing.back_s <= now_s:
                standing.probe(now_s)
            self.rotation.place(record, now_s)

    def _wake_at(self, instant_s: float, record: GroupRecord) -> None:
        heapq.heappush(self._wakes, (instant_s, next(self._order), record))

    def _is_known(self, record: GroupRecord) -> bool:
        return self._records.get(record.id) is record

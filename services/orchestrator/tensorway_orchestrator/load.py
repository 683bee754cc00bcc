"""How much a lane has to do, and how many replicas that needs. Pure: every hook takes `now_s` and costs the same however much it counted.

The need follows from the utilisation law (Denning and Buzen, "The operational analysis of queueing network models", 1978): rows a second
divided by what one replica serves is the number of replicas that compute all the time; divided by the target share, it is the number that
compute for that share. What waits is to be gone within a bound, which needs more for a while. A model that generates holds an answer's
place for as long as it talks: there the number of answers under way (Little's law) is compared with the places of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from tensorway.loads import ModelLoad
from tensorway.signature import RevisionSpec

#: Over how long rates are smoothed, seconds; and over how long to see a rise early.
SMOOTHING_S: Final = 10.0
RISING_S: Final = 2.0
#: What waits beyond a full batch should be served within so long, seconds.
CLEAR_WITHIN_S: Final = 10.0
#: Standard deviations by which the last two seconds must exceed the last ten before they are believed.
_SURELY: Final = 3.0
#: From this utilisation on, what groups serve is what they can.
_SATURATED: Final = 0.9
_DEFAULT_TARGET: Final = 0.7
#: What is counted joins the averages this often, seconds: an average costs an exponential, a count next to nothing.
_FOLD_S: Final = 0.1
#: A rate below this is none: what an average keeps of a request of long ago.
_NO_RATE: Final = 1e-3


@dataclass(slots=True)
class Rate:
    """So much a second, averaged with weights that fall to 1/e within `smoothing_s`. Begins at 0, and needs that long to be believed."""

    smoothing_s: float
    _per_s: float = 0.0
    _at_s: float = 0.0

    def add(self, amount: float, now_s: float) -> None:
        """Counts `amount` in."""
        self._per_s = self.read(now_s) + amount / self.smoothing_s
        self._at_s = max(self._at_s, now_s)

    def read(self, now_s: float) -> float:
        """The average as of `now_s`."""
        return self._per_s * math.exp(min(0.0, self._at_s - now_s) / self.smoothing_s) if self._per_s else 0.0


@dataclass(slots=True)
class _Counts:
    """What has come and been answered since it last joined the averages."""

    rows: int = 0
    squares: int = 0
    served: int = 0
    steps_s: float = 0.0
    batches: int = 0
    queued_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LaneView:
    """What a lane holds at one instant."""

    num_groups: int
    #: Rows (answers, of a model that generates) that wait for a group.
    waiting_rows: int
    #: Answers that groups are giving; 0 for other models.
    running_rows: int
    num_open: int
    #: Rows a second of one group in full batches, predicted; 0 while nothing is measured.
    replica_rows_per_s: float


@dataclass(slots=True, eq=False)
class LaneMeter:
    """Of one lane, which calls `arrived` and `answered`. `now_s` is the monotonic clock."""

    model: str
    revision: str
    #: Most rows of a batch; of a model that generates, the places of a group.
    max_rows: int
    generates: bool
    target: float
    #: When the last request came, or was last seen open; before that, when the lane was opened.
    since_s: float
    #: Called when the first request comes while the meter `is_cold`.
    on_call: Callable[[], None]
    #: No replica is wanted.
    is_cold: bool = False
    #: A request has come since then.
    is_called: bool = False
    _rows: Rate = field(default_factory=lambda: Rate(SMOOTHING_S))
    _rising: Rate = field(default_factory=lambda: Rate(RISING_S))
    #: Of the squares of requests' rows: how uncertain the other two are.
    _squares: Rate = field(default_factory=lambda: Rate(SMOOTHING_S))
    #: Rows answered, seconds of steps, requests, and their seconds in the queue.
    _served: Rate = field(default_factory=lambda: Rate(SMOOTHING_S))
    _steps: Rate = field(default_factory=lambda: Rate(SMOOTHING_S))
    _batches: Rate = field(default_factory=lambda: Rate(SMOOTHING_S))
    _queued: Rate = field(default_factory=lambda: Rate(SMOOTHING_S))
    _counts: _Counts = field(default_factory=_Counts)
    #: When the last thing was counted, and when counts are to join the averages.
    _counted_s: float = 0.0
    _fold_at_s: float = 0.0
    #: Answers under way, averaged over RISING_S.
    _under_way: float = 0.0
    _read_s: float = 0.0
    #: Last known of one replica, for groups come and go.
    _replica_rows_per_s: float = 0.0
    #: Mean time of a step, or of an answer that is generated, seconds; 0 while there was none.
    step_s: float = 0.0

    @classmethod
    def of(cls, spec: RevisionSpec, now_s: float, on_call: Callable[[], None]) -> LaneMeter:
        """The meter of a lane that is opened now."""
        target = _DEFAULT_TARGET if spec.scaling is None else spec.scaling.target_utilisation
        if spec.generation is not None:
            return cls(spec.model, spec.revision, spec.generation.max_sequences, True, target, now_s, on_call)
        max_rows = spec.batching.max_rows if spec.signature.is_batchable else 1
        return cls(spec.model, spec.revision, max_rows, False, target, now_s, on_call)

    def arrived(self, rows: int, now_s: float) -> None:
        """A request has come, whether or not it will be admitted: what is refused for want of replicas needs replicas, too."""
        if now_s >= self._fold_at_s:
            self._fold(now_s)
        self.since_s = self._counted_s = now_s
        counts = self._counts
        counts.rows += rows
        counts.squares += rows * rows
        if self.is_cold and not self.is_called:
            self.is_called = True
            self.on_call()

    def answered(self, rows: int, step_s: float, queue_s: float, now_s: float) -> None:
        """A batch has been answered after a step of `step_s`; its first request had waited `queue_s`. Where answers are generated, an
        attempt at one has ended after `step_s`."""
        self.step_s += (0.1 if self.step_s else 1.0) * (step_s - self.step_s)
        if now_s >= self._fold_at_s:
            self._fold(now_s)
        self._counted_s = now_s
        counts = self._counts
        counts.served += rows
        counts.steps_s += step_s
        counts.batches += 1
        counts.queued_s += max(0.0, queue_s)

    def cool(self, is_cold: bool) -> None:
        """Says whether no replica is wanted."""
        if not is_cold:
            self.is_called = False
        self.is_cold = is_cold

    def read(self, view: LaneView, now_s: float) -> ModelLoad:
        """The load as of `now_s`."""
        self._fold(now_s)
        if view.num_open:
            self.since_s = now_s
        busy_groups = self._busy_groups(view, now_s)
        self._replica_rows_per_s = self._rate_of_replica(view, busy_groups, now_s)
        arrival = self._rows.read(now_s)
        batches = self._batches.read(now_s)
        return ModelLoad(
            model=self.model, revision=self.revision,
            arrival_rows_per_s=arrival if arrival > _NO_RATE else 0.0,
            demand_rows_per_s=self._demand(now_s),
            queue_s=self._queued.read(now_s) / batches if batches > _NO_RATE else 0.0,
            busy_groups=busy_groups, num_groups=view.num_groups, replica_rows_per_s=self._replica_rows_per_s,
            waiting_rows=view.waiting_rows, num_open=view.num_open, predicted_replicas=self._need(view, now_s),
            idle_s=max(0.0, now_s - self.since_s), is_called=self.is_called,
        )

    def _fold(self, now_s: float) -> None:
        counts, at_s = self._counts, self._counted_s
        self._fold_at_s = now_s + _FOLD_S
        if counts.rows:
            self._rows.add(counts.rows, at_s)
            self._rising.add(counts.rows, at_s)
            self._squares.add(counts.squares, at_s)
        if counts.batches:
            self._served.add(counts.served, at_s)
            self._steps.add(counts.steps_s, at_s)
            self._batches.add(counts.batches, at_s)
            self._queued.add(counts.queued_s, at_s)
        counts.rows = counts.squares = counts.served = counts.batches = 0
        counts.steps_s = counts.queued_s = 0.0

    def _demand(self, now_s: float) -> float:
        """The slow rate, unless the quick one is surely more: its variance, of requests that come by chance, is squares / (2 x time)."""
        slow, quick = self._rows.read(now_s), self._rising.read(now_s)
        noise = math.sqrt(max(self._squares.read(now_s), 0.0) / (2.0 * RISING_S))
        demand = quick if quick > slow + _SURELY * noise else slow
        return demand if demand > _NO_RATE else 0.0

    def _busy_groups(self, view: LaneView, now_s: float) -> float:
        if self.generates:
            return view.running_rows / self.max_rows
        steps = self._steps.read(now_s)
        return min(float(view.num_groups), steps) if steps > _NO_RATE else 0.0

    def _rate_of_replica(self, view: LaneView, busy_groups: float, now_s: float) -> float:
        """What one replica serves in full batches. Predicted from step times, and never less than what was seen; where all groups are
        busy and batches are full, what was seen is the truth."""
        if self.generates:
            return self.max_rows / self.step_s if self.step_s > 0.0 else 0.0
        steps = self._steps.read(now_s)
        seen = self._served.read(now_s) / steps if steps > _NO_RATE else 0.0
        is_full = view.num_groups and busy_groups >= _SATURATED * view.num_groups and view.waiting_rows >= self.max_rows
        if is_full and seen:
            return seen
        return max(view.replica_rows_per_s, seen) or self._replica_rows_per_s

    def _need(self, view: LaneView, now_s: float) -> float:
        if self.generates:
            share = 1.0 - math.exp(-max(0.0, now_s - self._read_s) / RISING_S)
            self._under_way += share * (view.running_rows + view.waiting_rows - self._under_way)
            self._read_s = now_s
            return self._under_way / (self.max_rows * self.target) if self._under_way > _NO_RATE else 0.0
        if not self._replica_rows_per_s:
            return 0.0
        backlog = max(0, view.waiting_rows - self.max_rows * max(1, view.num_groups))
        return (self._demand(now_s) / self.target + backlog / CLEAR_WITHIN_S) / self._replica_rows_per_s

"""When a batch leaves and what may be in it. Pure.

Work-conserving: if a group is idle, what is there goes now. While a group runs one batch, the next is held back for as long as the measured
step time allows, so that it can still grow, and leaves early once it is full. `max_delay_ms` above 0 is the author's wish to wait.

One exception (docs/decisions/0005): answers bring requests. Callers that wait for an answer before they send again come back in a burst
just after a batch was answered; a batch that leaves a moment before them makes them wait for a whole step, and is small. Where the
measured step times say that more rows a second come of waiting for them (a few per cent of a step, at most), the batch waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tensorway.signature import ROWS, Batching, RevisionSpec, Signature
from tensorway_orchestrator.requests import Request
from tensorway_orchestrator.step_times import StepTimes

#: Share of a full step, and seconds, that a batch waits at most for the burst after an answer.
_BURST_SHARE: Final = 0.06
_MAX_BURST_S: Final = 0.012
#: Waiting must promise this much more throughput.
_MIN_GAIN: Final = 1.05
_SMOOTHING: Final = 0.2
#: Share of the time to a deadline that a batch may be predicted to take.
_IN_TIME: Final = 0.9
#: Steps measured before predictions bound a batch.
_MIN_SAMPLES: Final = 10


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one batch of a revision may hold."""

    max_rows: int
    max_bytes: int
    max_requests: int
    max_delay_s: float

    @classmethod
    def of(cls, spec: RevisionSpec, max_bytes: int) -> BatchLimits:
        """A model that cannot be batched gets one request a step."""
        batching: Batching = spec.batching
        max_requests = batching.max_rows if spec.signature.is_batchable else 1
        return cls(batching.max_rows, max_bytes, max_requests, batching.max_delay_ms / 1e3)


@dataclass(frozen=True, slots=True)
class ShapeRule:
    """Which extents of which inputs must agree within a batch: those that vary and have no padding rule."""

    #: (input name, dimension index)
    dimensions: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, signature: Signature, batching: Batching) -> ShapeRule:
        padded = {padding.input for padding in batching.padding}
        return cls(tuple(
            (spec.name, index)
            for spec in signature.inputs
            if spec.name not in padded
            for index, extent in enumerate(spec.shape)
            if isinstance(extent, str) and extent != ROWS
        ))

    def shape_key(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The extents by which requests are kept apart; -1 where an input is missing or too short (the leader will say so)."""
        return tuple(
            shapes[name][index] if name in shapes and index < len(shapes[name]) else -1 for name, index in self.dimensions
        )


@dataclass(slots=True)
class Burst:
    """How many rows come just after a batch was answered: learned as a share of the rows answered."""

    return_share: float = 0.0
    _ends_s: float = 0.0
    _answered: int = 0
    _arrived: int = 0

    def answered(self, rows: int, window_s: float, now_s: float) -> None:
        """A batch has been answered: its callers may be back within `window_s`."""
        self._settle(now_s)
        self._answered += rows
        self._ends_s = now_s + window_s

    def arrived(self, rows: int, now_s: float) -> None:
        """Counts a request in, while the window is open."""
        self._settle(now_s)
        if self._answered:
            self._arrived += rows

    def missing_rows(self, now_s: float) -> float:
        """Rows still expected within the window; 0 outside it."""
        self._settle(now_s)
        return max(0.0, self.return_share * self._answered - self._arrived)

    @property
    def ends_s(self) -> float:
        return self._ends_s

    def _settle(self, now_s: float) -> None:
        """Learns from a window that is over."""
        if self._answered and now_s >= self._ends_s:
            share = min(1.0, self._arrived / self._answered)
            self.return_share += _SMOOTHING * (share - self.return_share)
            self._answered = self._arrived = 0


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """One group as seen when a batch could leave."""

    #: Batches sent and not answered.
    num_in_flight: int
    #: Rows of the batch sent last; 0 while idle.
    running_rows: int
    #: Predicted end of the running batch, on the monotonic clock; meaningless while idle.
    predicted_idle_s: float
    #: How long a batch is on its way before the group could start it, seconds.
    lead_s: float
    step_times: StepTimes


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits for a group."""

    num_rows: int
    oldest_arrival_s: float
    earliest_deadline_s: float


def burst_window_s(limits: BatchLimits, step_times: StepTimes) -> float:
    """How long after an answer a batch may wait for company."""
    return min(_MAX_BURST_S, _BURST_SHARE * step_times.predict_s(limits.max_rows))


def rows_in_time(limits: BatchLimits, head: Request, load: GroupLoad, now_s: float) -> int:
    """Most rows of a batch that is still answered before its most urgent request is due, at least that request's own: where rows cost time
    and deadlines are short, a full batch would be too late for all in it."""
    wait_s = max(0.0, load.predicted_idle_s - now_s) if load.num_in_flight else 0.0
    left_s = _IN_TIME * (head.deadline_s - now_s) - wait_s - load.lead_s
    if load.step_times.num_samples < _MIN_SAMPLES or load.step_times.predict_s(limits.max_rows) <= left_s:
        return limits.max_rows
    if not load.step_times.knows_slope:
        # Half of it shows what smaller batches take; until then there is nothing to go by.
        return max(head.weight, limits.max_rows // 2)
    one_s, full_s = load.step_times.predict_s(1), load.step_times.predict_s(limits.max_rows)
    per_row_s = (full_s - one_s) / max(1, limits.max_rows - 1)
    if per_row_s <= 0.0:
        return limits.max_rows
    return max(head.weight, min(limits.max_rows, 1 + int((left_s - one_s) / per_row_s)))


def leave_at_s(limits: BatchLimits, waiting: Waiting, load: GroupLoad, burst: Burst, now_s: float) -> float:
    """The instant at which the queue's next batch should leave for this group: `now_s` or before means at once, infinity means not
    before the running batch has been answered."""
    if waiting.num_rows >= limits.max_rows or limits.max_requests == 1:
        return now_s
    wanted_s = waiting.oldest_arrival_s + limits.max_delay_s
    if load.num_in_flight == 0:
        wait_s = burst.ends_s - now_s
        if wait_s > 0.0 and _pays(limits, waiting, load, burst.missing_rows(now_s), wait_s, now_s):
            return max(wanted_s, burst.ends_s)
        return wanted_s
    expected_rows = burst.return_share * load.running_rows
    wait_s = load.lead_s + burst_window_s(limits, load.step_times)
    if _pays(limits, waiting, load, expected_rows, wait_s, load.predicted_idle_s):
        return float("inf")
    return max(wanted_s, load.predicted_idle_s - load.lead_s)


def _pays(limits: BatchLimits, waiting: Waiting, load: GroupLoad, expected_rows: float, wait_s: float, idle_s: float) -> bool:
    """True where the group, idle from `idle_s` on, serves more rows a second by waiting `wait_s` for `expected_rows` more."""
    rows = min(float(limits.max_rows), waiting.num_rows + expected_rows)
    if rows < waiting.num_rows + 1:
        return False
    step_s, later_s = load.step_times.predict_s(waiting.num_rows), load.step_times.predict_s(rows)
    if step_s <= 0.0 or max(idle_s, 0.0) + wait_s + later_s > waiting.earliest_deadline_s:
        return False
    return rows / (wait_s + later_s) > _MIN_GAIN * waiting.num_rows / step_s

"""When a request that joins the queue now would be answered: from running sums over the groups, never from a look at each. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Final

from tensorway_orchestrator.step_times import StepTimes

if TYPE_CHECKING:
    from tensorway_orchestrator.group_record import GroupRecord

#: What is overtaken by more than the groups serve moves on at so many rows a second.
_MIN_RATE: Final = 1e-6
#: A step is taken to last at least this long, seconds.
_MIN_STEP_S: Final = 1e-6
#: Stale instants kept besides one for each group, before all are sorted anew.
_MAX_STALE: Final = 64


@dataclass(slots=True, eq=False)
class Forecast:
    """Of one revision. Counts the groups in rotation: `enter` and `exit` go in pairs, and around every change of times and slowness."""

    #: Most rows of a batch.
    max_rows: int
    #: The step times of all groups in rotation together; each counts for its last 50 or so steps, however busy it is.
    typical: StepTimes = field(default_factory=StepTimes)
    #: Rows a second of the groups that have measured steps, in full batches.
    _rows_per_s: float = 0.0
    _num_measured: int = 0
    #: Of all groups' slowness.
    _slowness: float = 0.0
    _num_unmeasured: int = 0
    #: (predicted idle instant, order, group); only the last entry of a group counts.
    _idle: list[tuple[float, int, GroupRecord]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=count)

    @property
    def num_groups(self) -> int:
        return self._num_measured + self._num_unmeasured

    @property
    def mean_slowness(self) -> float:
        """See `Standing.slowness`; 1 where there is no group."""
        return self._slowness / self.num_groups if self.num_groups else 1.0

    def enter(self, record: GroupRecord) -> None:
        """Counts a group in. What it has in flight must be told to `loaded`."""
        self._slowness += record.standing.slowness
        if not record.step_times.num_samples:
            self._num_unmeasured += 1
            return
        self._num_measured += 1
        self.typical.absorb(record.step_times)
        record.rows_per_s = self.max_rows / max(_MIN_STEP_S, record.step_times.predict_s(self.max_rows))
        self._rows_per_s += record.rows_per_s

    def exit(self, record: GroupRecord) -> None:
        """Counts a group out."""
        self._slowness -= record.standing.slowness
        if not record.step_times.num_samples:
            self._num_unmeasured -= 1
            return
        self._num_measured -= 1
        self.typical.expel(record.step_times)
        self._rows_per_s = self._rows_per_s - record.rows_per_s if self._num_measured else 0.0
        record.rows_per_s = 0.0

    def loaded(self, record: GroupRecord, num_records: int) -> None:
        """What a group in rotation has to do has changed. `num_records` bounds what is kept of the past."""
        if not record.in_flight:
            return
        self._push(record, record.predicted_idle_s)
        if len(self._idle) > 2 * num_records + _MAX_STALE:
            self._idle = [entry for entry in self._idle if _counts(entry)]
            heapq.heapify(self._idle)

    def rows_per_s(self) -> float:
        """What the groups in rotation serve in full batches, predicted; 0 while nothing is measured."""
        rows_per_s = self._rows_per_s
        if self._num_unmeasured and self.typical.num_samples:
            rows_per_s += self._num_unmeasured * self.max_rows / max(_MIN_STEP_S, self.typical.predict_s(self.max_rows))
        return rows_per_s

    def wait_and_step_s(self, rows_ahead: int, rows: int, overtaking_per_s: float) -> tuple[float, float] | None:
        """How long `rows` rows behind `rows_ahead` wait after the first group has become idle, while so many rows a second overtake them,
        and how long the step with them takes; None while nothing is measured.

        Groups become idle one after the other, evenly: as long as the queue holds full batches, one leaves every `max_rows / rows_per_s`.
        Behind a full batch the request's own will be full too, because more come after it.
        """
        rows_per_s = self.rows_per_s()
        if rows_per_s <= 0.0:
            return None
        num_full = (rows_ahead + min(rows, self.max_rows) - 1) // self.max_rows
        size = max(self.max_rows, rows) if num_full else rows_ahead + rows
        # The quick groups take more batches: the mean step is that of a batch, not that of a group.
        full_s = self.num_groups * self.max_rows / rows_per_s
        typical_s = self.typical.predict_s(self.max_rows)
        step_s = full_s * self.typical.predict_s(size) / typical_s if typical_s > 0.0 else full_s
        wait_s = num_full * self.max_rows / max(_MIN_RATE, rows_per_s - overtaking_per_s) if num_full else 0.0
        return wait_s, step_s

    def first_idle_s(self, now_s: float) -> float:
        """When the first of the busy groups in rotation is predicted to be idle, not before `now_s`; `now_s` where there is none."""
        heap = self._idle
        while heap:
            if not _counts(heap[0]):
                heapq.heappop(heap)
                continue
            idle_s, _, record = heap[0]
            expected_s = now_s + record.wait_s(now_s)
            if idle_s >= now_s or expected_s <= now_s:
                return max(now_s, idle_s)
            # Overdue: looked at again when it has been so for twice as long.
            heapq.heappop(heap)
            self._push(record, expected_s)
        return now_s

    def _push(self, record: GroupRecord, idle_s: float) -> None:
        record.idle_entry = next(self._order)
        heapq.heappush(self._idle, (idle_s, record.idle_entry, record))


def _counts(entry: tuple[float, int, GroupRecord]) -> bool:
    """Whether the entry is its group's last, and the group is busy and in rotation."""
    _, order, record = entry
    return record.idle_entry == order and record.is_in_rotation and bool(record.in_flight)

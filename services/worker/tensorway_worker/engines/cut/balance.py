"""Where to cut a chain of units so that its slowest stage is as fast as can be. Pure: numbers only, no torch.

The linear partition problem, solved by dynamic programming over (number of stages, number of units): the best cut of the first j units into
k stages is the best cut of the first i into k - 1, followed by a stage of units i to j - 1, for the best i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from tensorway.errors import FailedPrecondition

#: Bytes that a stage of units [first, last) holds.
StageBytes = Callable[[int, int], int]


@dataclass(frozen=True, slots=True)
class Balance:
    """A cut: stage s holds units [boundaries[s], boundaries[s + 1])."""

    boundaries: tuple[int, ...]
    #: Predicted time of the slowest stage, seconds, and bytes of the largest (not necessarily the same one).
    slowest_s: float
    largest_bytes: int


@dataclass(frozen=True, slots=True)
class _Best:
    slowest_s: float
    largest_bytes: int
    boundaries: tuple[int, ...]

    @property
    def rank(self) -> tuple[float, int]:
        return self.slowest_s, self.largest_bytes


def balanced(times_s: Sequence[float], stage_bytes: StageBytes, num_stages: int, limit_bytes: int | None = None) -> Balance:
    """The cut into `num_stages` stages, each of one unit or more, whose slowest stage takes the least time.

    Args:
        times_s: predicted time of each unit, in order.
        stage_bytes: bytes of any run of units; units may share weights, so this need not be a sum.
        limit_bytes: most bytes of one stage; None: no limit. Among cuts of equal time the one whose largest stage is smaller wins.

    Raises FailedPrecondition where there are fewer units than stages, or no cut keeps the limit.
    """
    num_units = len(times_s)
    if num_stages > num_units:
        raise FailedPrecondition(f"{num_units} parts cannot make {num_stages} stages", field="parallel.pipeline")
    until = [0.0, *accumulate(times_s)]

    def stage(first: int, last: int) -> tuple[float, int] | None:
        size = stage_bytes(first, last)
        return None if limit_bytes is not None and size > limit_bytes else (until[last] - until[first], size)

    best: list[_Best | None] = [_Best(0.0, 0, (0,)), *(None for _ in range(num_units))]
    for _ in range(num_stages):
        best = [_extended(best, last, stage) for last in range(num_units + 1)]
    found = best[num_units]
    if found is None:
        raise FailedPrecondition(
            f"no cut into {num_stages} stages keeps every stage within {limit_bytes} bytes: take more stages or smaller weights "
            "(weights_dtype)",
            field="parallel.pipeline",
        )
    return Balance(found.boundaries, found.slowest_s, found.largest_bytes)


def _extended(best: Sequence[_Best | None], last: int, stage: Callable[[int, int], tuple[float, int] | None]) -> _Best | None:
    """The best cut of the first `last` units with one stage more than `best`."""
    found: _Best | None = None
    for first in range(last - 1, -1, -1):
        before = best[first]
        if before is None:
            continue
        cost = stage(first, last)
        if cost is None:
            # A longer stage needs no less.
            break
        new = _Best(max(before.slowest_s, cost[0]), max(before.largest_bytes, cost[1]), (*before.boundaries, last))
        if found is None or new.rank < found.rank:
            found = new
    return found


def busy_shares(stage_times_s: Sequence[float]) -> tuple[float, ...]:
    """How much of the time each stage computes once the pipeline is full: its time over the slowest one's."""
    slowest = max(stage_times_s)
    return tuple(time / slowest if slowest > 0 else 1.0 for time in stage_times_s)


def pipelined_s(stage_times_s: Sequence[float], hop_s: float, num_micro_batches: int) -> float:
    """Predicted time of a step in `num_micro_batches` equal pieces, seconds: the first piece passes every stage, the others follow at the
    pace of the slowest. `stage_times_s` are those of the whole batch, taken to shrink with its pieces."""
    pieces = max(1, num_micro_batches)
    times = [time / pieces for time in stage_times_s]
    return sum(times) + hop_s * (len(times) if len(times) > 1 else 0) + (pieces - 1) * max(times)

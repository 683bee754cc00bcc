"""Boundaries: the slowest stage is as fast as it can be, and no stage too large."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as some

from tensorway.errors import FailedPrecondition
from tensorway_worker.engines.cut.balance import balanced, busy_shares, pipelined_s


def sums(sizes: list[int]) -> Callable[[int, int], int]:
    return lambda first, last: sum(sizes[first:last])


def slowest(times: list[int], cuts: tuple[int, ...]) -> int:
    return max(sum(times[first:last]) for first, last in pairwise(cuts))


@given(some.lists(some.integers(0, 50), min_size=1, max_size=8), some.integers(1, 8))
def test_no_cut_is_faster(times: list[int], num_stages: int) -> None:
    if num_stages > len(times):
        with pytest.raises(FailedPrecondition, match="cannot make"):
            balanced(times, sums(times), num_stages)
        return
    found = balanced(times, sums([1] * len(times)), num_stages)
    every = [(0, *inner, len(times)) for inner in combinations(range(1, len(times)), num_stages - 1)]
    assert found.boundaries in every
    assert slowest(times, found.boundaries) == min(slowest(times, cuts) for cuts in every) == round(found.slowest_s)


@given(some.lists(some.tuples(some.integers(1, 9), some.integers(1, 9)), min_size=2, max_size=7), some.integers(2, 3), some.integers(5, 40))
def test_the_limit_is_kept_at_the_least_cost(units: list[tuple[int, int]], num_stages: int, limit: int) -> None:
    times, sizes = [unit[0] for unit in units], [unit[1] for unit in units]
    every = [(0, *inner, len(units)) for inner in combinations(range(1, len(units)), num_stages - 1)]
    fitting = [cuts for cuts in every if slowest(sizes, cuts) <= limit]
    if not fitting:
        with pytest.raises(FailedPrecondition):
            balanced(times, sums(sizes), num_stages, limit)
        return
    found = balanced(times, sums(sizes), num_stages, limit)
    assert slowest(sizes, found.boundaries) <= limit
    assert round(found.slowest_s) == min(slowest(times, cuts) for cuts in fitting)


def test_a_head_as_heavy_as_eight_layers_counts_as_eight_layers() -> None:
    found = balanced([0.0, *[1.0] * 30, 8.0], sums([1] * 32), 2)
    assert found.boundaries == (0, 20, 32)


def test_of_equally_fast_cuts_the_smaller_wins() -> None:
    assert balanced([1, 0, 1], sums([10, 5, 1]), 2).boundaries == (0, 1, 3)


def test_the_limit_is_named() -> None:
    with pytest.raises(FailedPrecondition, match="within 5 bytes: take more stages or smaller weights"):
        balanced([1, 1], sums([6, 6]), 2, 5)


def test_a_full_pipeline_runs_at_the_pace_of_its_slowest_stage() -> None:
    assert busy_shares([2.0, 4.0, 1.0]) == (0.5, 1.0, 0.25)
    assert busy_shares([0.0, 0.0]) == (1.0, 1.0)
    assert pipelined_s([4.0], 1.0, 1) == 4.0
    assert pipelined_s([4.0, 4.0], 1.0, 1) == 10.0
    # Two halves: 2 + 2 and the hops, then the second half 2 later.
    assert pipelined_s([4.0, 4.0], 1.0, 2) == 8.0

"""The queue and the batching rules, with integers and a clock that is an argument."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.errors import InternalError
from tensorway.signature import Batching, Padding, RevisionSpec, Signature, TensorSpec
from tensorway.tensors import DataType
from tensorway_orchestrator.batching import BatchLimits, Burst, GroupLoad, ShapeRule, Waiting, leave_at_s
from tensorway_orchestrator.requests import Request, RequestQueue
from tensorway_orchestrator.step_times import StepTimes

_ORIGIN: Any = object()


def request(
    name: str = "r", rows: int = 1, *, priority: int = 0, deadline_s: float = 10.0, key: tuple[int, ...] = (), size: int = 8
) -> Request:
    return Request(name, rows, size, priority, deadline_s, key, b"", (), 0.0, _ORIGIN)


def names(requests: list[Request]) -> list[str]:
    return [taken.request_id for taken in requests]


def take(queue: RequestQueue, max_rows: int = 32, max_bytes: int = 10**9, max_requests: int = 32) -> list[Request]:
    head = queue.peek()
    return [] if head is None else queue.take(head, max_rows, max_bytes, max_requests)


def test_higher_priority_then_earlier_deadline_goes_first() -> None:
    queue = RequestQueue()
    for offered in (request("late", deadline_s=9), request("soon", deadline_s=3), request("urgent", priority=1, deadline_s=50)):
        queue.offer(offered)
    assert names(take(queue)) == ["urgent", "soon", "late"]


def test_equal_requests_keep_their_order() -> None:
    queue = RequestQueue()
    for number in range(20):
        queue.offer(request(str(number)))
    assert names(take(queue)) == [str(number) for number in range(20)]


def test_different_shapes_never_share_a_batch_and_the_most_urgent_shape_leads() -> None:
    queue = RequestQueue()
    queue.offer(request("a", key=(3,), deadline_s=5))
    queue.offer(request("b", key=(4,), deadline_s=1))
    queue.offer(request("c", key=(3,), deadline_s=2))
    assert names(take(queue)) == ["b"]
    assert names(take(queue)) == ["c", "a"]


def test_a_small_request_may_fill_the_place_a_large_one_cannot() -> None:
    queue = RequestQueue()
    for offered in (request("ten", 10), request("eight", 8), request("two", 2)):
        queue.offer(offered)
    assert names(take(queue, max_rows=12)) == ["ten", "two"]
    assert names(take(queue, max_rows=12)) == ["eight"]


def test_an_oversize_request_comes_alone() -> None:
    queue = RequestQueue()
    queue.offer(request("big", 40, deadline_s=1))
    queue.offer(request("small", 1))
    assert names(take(queue)) == ["big"]
    assert names(take(queue)) == ["small"]


def test_bytes_bound_a_batch() -> None:
    queue = RequestQueue()
    for number in range(3):
        queue.offer(request(str(number), size=60))
    assert names(take(queue, max_bytes=100)) == ["0"]


def test_a_closed_request_is_dropped_and_not_counted() -> None:
    queue = RequestQueue()
    gone, stays = request("gone", 5), request("stays", 7)
    queue.offer(gone)
    queue.offer(stays)
    gone.is_open = False
    queue.withdraw(gone)
    assert (queue.num_rows, queue.num_requests) == (7, 1)
    assert names(take(queue)) == ["stays"]
    assert queue.peek() is None


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(-2, 2), st.integers(0, 9), st.integers(0, 2)), max_size=60), st.integers(1, 32))
def test_every_request_is_taken_exactly_once_within_the_limits(rows: list[tuple[int, int, int, int]], max_rows: int) -> None:
    queue = RequestQueue()
    for number, (count, priority, deadline_s, key) in enumerate(rows):
        queue.offer(request(str(number), count, priority=priority, deadline_s=deadline_s, key=(key,)))
    taken: list[str] = []
    while batch := take(queue, max_rows=max_rows):
        assert len(batch) == 1 or sum(part.weight for part in batch) <= max_rows
        assert len({part.shape_key for part in batch}) == 1
        taken += names(batch)
    assert sorted(taken, key=int) == [str(number) for number in range(len(rows))]
    assert (queue.num_rows, queue.num_requests) == (0, 0)


LIMITS = BatchLimits(max_rows=32, max_bytes=10**9, max_requests=32, max_delay_s=0.0)


def times(fixed_s: float, per_row_s: float) -> StepTimes:
    known = StepTimes()
    for rows in (1, 8, 16, 32) * 3:
        known.observe(rows, fixed_s + per_row_s * rows)
    return known


def load(num_in_flight: int = 0, rows: int = 0, idle_s: float = 0.0, step_times: StepTimes | None = None) -> GroupLoad:
    return GroupLoad(num_in_flight, rows, idle_s, 0.004, step_times or StepTimes())


def waiting(rows: int, arrived_s: float = 6.9, deadline_s: float = 60.0) -> Waiting:
    return Waiting(rows, arrived_s, deadline_s)


def burst_of(share: float) -> Burst:
    return Burst(return_share=share)


def test_an_idle_group_takes_what_is_there_now() -> None:
    assert leave_at_s(LIMITS, waiting(1, 5.0), load(), Burst(), now_s=7.0) <= 7.0


def test_the_second_batch_leaves_as_late_as_the_step_time_allows() -> None:
    assert leave_at_s(LIMITS, waiting(3), load(1, 8, 7.100), Burst(), now_s=7.0) == 7.096


def test_a_full_batch_does_not_wait() -> None:
    assert leave_at_s(LIMITS, waiting(32), load(1, 8, 9.0, times(0.02, 0.001)), burst_of(1.0), now_s=7.0) == 7.0


def test_max_delay_is_the_authors_wish_to_wait() -> None:
    limits = BatchLimits(32, 10**9, 32, max_delay_s=0.05)
    assert leave_at_s(limits, waiting(1, 7.0), load(), Burst(), now_s=7.0) == 7.05
    assert leave_at_s(limits, waiting(32, 7.0), load(), Burst(), now_s=7.0) == 7.0


def test_the_burst_after_an_answer_is_waited_for_where_it_pays() -> None:
    """Fixed cost dominates: 1 row in 21 ms, 8 rows in 28 ms."""
    burst, known = burst_of(1.0), times(0.020, 0.001)
    burst.answered(8, 0.003, now_s=7.0)
    burst.arrived(1, now_s=7.001)
    assert leave_at_s(LIMITS, waiting(1, 7.001), load(step_times=known), burst, now_s=7.001) == 7.003
    burst.arrived(7, now_s=7.002)
    assert leave_at_s(LIMITS, waiting(8, 7.001), load(step_times=known), burst, now_s=7.002) <= 7.002


def test_and_not_where_rows_cost_the_same_in_any_batch() -> None:
    burst, known = burst_of(1.0), times(0.0, 0.010)
    burst.answered(8, 0.003, now_s=7.0)
    assert leave_at_s(LIMITS, waiting(1, 7.0), load(step_times=known), burst, now_s=7.0) <= 7.0
    assert leave_at_s(LIMITS, waiting(8), load(1, 24, 7.2, known), burst, now_s=7.0) == pytest.approx(7.196)


def test_the_second_batch_waits_for_the_first_ones_callers_where_it_pays() -> None:
    assert leave_at_s(LIMITS, waiting(8), load(1, 24, 7.05, times(0.02, 0.001)), burst_of(1.0), now_s=7.0) == float("inf")
    assert leave_at_s(LIMITS, waiting(8), load(1, 24, 7.05, times(0.02, 0.001)), burst_of(0.0), now_s=7.0) == pytest.approx(7.046)


def test_a_near_deadline_is_not_waited_away() -> None:
    soon = waiting(8, deadline_s=7.06)
    assert leave_at_s(LIMITS, soon, load(1, 24, 7.05, times(0.02, 0.001)), burst_of(1.0), now_s=7.0) == pytest.approx(7.046)


def test_the_share_that_returns_is_learned_and_forgotten() -> None:
    burst, now_s = Burst(), 0.0
    for _ in range(20):
        burst.answered(10, 0.01, now_s)
        burst.arrived(10, now_s + 0.005)
        now_s += 1.0
    assert burst.missing_rows(now_s) == 0.0
    assert burst.return_share > 0.95
    for _ in range(20):
        burst.answered(10, 0.01, now_s)
        burst.arrived(10, now_s + 0.5)  # too late to count
        now_s += 1.0
    assert burst.return_share < 0.05


def test_step_times_are_a_line_through_what_was_seen() -> None:
    known = times(0.020, 0.001)
    assert known.predict_s(64) == pytest.approx(0.084)
    assert known.predict_s(1) == pytest.approx(0.021)


def _spec(*inputs: TensorSpec, padding: tuple[Padding, ...] = ()) -> RevisionSpec:
    outputs = (TensorSpec("y", DataType.FP32, ("rows",)),)
    return RevisionSpec("m", "0" * 64, "1", "", "python", Signature(inputs, outputs), Batching(padding=padding), 1, 60.0)


def test_only_varying_dimensions_without_padding_keep_requests_apart() -> None:
    ids = TensorSpec("ids", DataType.INT64, ("rows", "length"))
    image = TensorSpec("image", DataType.FP32, ("rows", 3, "height", "width"))
    spec = _spec(ids, image, padding=(Padding("ids", 0.0),))
    rule = ShapeRule.of(spec.signature, spec.batching)
    assert rule.shape_key({"ids": (2, 7), "image": (2, 3, 10, 20)}) == (10, 20)
    assert rule.shape_key({"ids": (2, 7), "image": (2,)}) == (-1, -1)


def test_a_model_without_rows_runs_one_request_a_step() -> None:
    spec = _spec(TensorSpec("threshold", DataType.FP32, ()))
    assert BatchLimits.of(spec, 10).max_requests == 1


def test_a_request_whose_batch_key_changes_while_it_waits_is_filed_anew() -> None:
    queue = RequestQueue()
    first, second = request("first", deadline_s=1), request("second", deadline_s=2)
    queue.offer(first)
    queue.offer(second)
    first.lost_groups = ("g#1",)
    queue.refile(first)
    assert (queue.num_rows, queue.num_requests, queue.rows_ahead(0)) == (2, 2, 2)
    assert names(queue.heads()) == ["first", "second"]
    head = queue.peek()
    assert head is first
    assert names(queue.take(head, 32, 10**9, 32)) == ["first"]
    assert names(take(queue)) == ["second"]
    assert queue.peek() is None
    queue.refile(first)  # it waits no more
    assert queue.num_requests == 0


def test_a_request_waits_once() -> None:
    queue = RequestQueue()
    once = request("once")
    queue.offer(once)
    with pytest.raises(InternalError, match="queued twice"):
        queue.offer(once)


@given(st.lists(st.tuples(st.sampled_from(["offer", "lose", "close", "take"]), st.integers(0, 5)), max_size=60))
def test_whatever_happens_to_waiting_requests_each_is_taken_once_or_never(steps: list[tuple[str, int]]) -> None:
    queue = RequestQueue()
    requests = [request(str(number), deadline_s=number) for number in range(6)]
    for step, number in steps:
        one = requests[number]
        if step == "offer" and one.is_open and not one.is_queued:
            queue.offer(one)
        elif step == "lose":
            one.lost_groups = (*one.lost_groups, f"g{len(one.lost_groups)}")
            queue.refile(one)
        elif step == "close" and one.is_open:
            one.is_open = False
            if one.is_queued:
                queue.withdraw(one)
        elif step == "take" and (head := queue.peek()) is not None:
            taken = queue.take(head, 4, 10**9, 4)
            assert taken[0] is head
            assert all(each.is_open and not each.is_queued for each in taken)
        waiting = [each for each in requests if each.is_queued]
        assert (queue.num_requests, queue.num_rows) == (len(waiting), len(waiting))
        assert len(queue.heads()) == len({each.batch_key for each in waiting})

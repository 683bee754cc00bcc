"""Which requests a batch takes when not all can be in time."""

from __future__ import annotations

import pytest
from roster_bench import Bench

from tensorway.errors import TensorwayError
from tensorway.transport.port import Payload
from tensorway_orchestrator.batching import BatchLimits
from tensorway_orchestrator.boarding import Boarding, board
from tensorway_orchestrator.requests import Request, RequestQueue
from tensorway_orchestrator.step_times import StepTimes

LIMITS = BatchLimits(max_rows=16, max_bytes=1000, max_requests=16, max_delay_s=0.0)
#: Steps of 10 ms and 2 ms a row: full batches serve 4.5 times what single rows do.
FIXED_S, PER_ROW_S = 0.010, 0.002


class Caller:
    """Implements `tensorway.transport.port.Exchange`."""

    head = b""
    payload: Payload = b""

    def reply(self, head: bytes, payload: Payload) -> None:
        raise AssertionError("nothing is answered here")

    def fail(self, error: TensorwayError) -> None:
        raise AssertionError("nothing is answered here")

    def on_cancel(self, callback: object) -> None:
        raise AssertionError("nothing is cancelled here")


def measured(fixed_s: float = FIXED_S, per_row_s: float = PER_ROW_S) -> Bench:
    bench = Bench(1, max_rows=16)
    for _ in range(30):
        for rows in (1, 8, 16):
            bench.run("g0", fixed_s + per_row_s * rows, rows=rows)
    return bench


def offer(queue: RequestQueue, bench: Bench, in_s: float, num: int = 1, *, rows: int = 1, num_bytes: int = 1, priority: int = 0) -> None:
    for _ in range(num):
        queue.offer(Request("r", rows, num_bytes, priority, bench.now_s + in_s, (), b"", b"", bench.now_s, Caller()))


def boarded(queue: RequestQueue, bench: Bench) -> Boarding:
    head = queue.peek()
    assert head is not None
    return board(queue, head, bench["g0"], LIMITS, bench.now_s)


def test_while_all_is_in_time_the_batch_is_the_queue() -> None:
    bench, queue = measured(), RequestQueue()
    offer(queue, bench, 1.0, 20)
    result = boarded(queue, bench)
    assert (len(result.taken), len(result.doomed), queue.num_rows) == (16, 0, 4)


def test_what_would_be_late_makes_room_for_what_would_not() -> None:
    bench, queue = measured(), RequestQueue()
    offer(queue, bench, 0.005, 10)
    offer(queue, bench, 0.500, 20)
    result = boarded(queue, bench)
    assert (len(result.taken), len(result.doomed), queue.num_rows) == (16, 10, 4)
    assert all(request.deadline_s == bench.now_s + 0.5 for request in result.taken)


def test_a_batch_becomes_smaller_for_its_head_as_far_as_that_costs_little() -> None:
    bench, queue = measured(), RequestQueue()
    offer(queue, bench, 0.028)
    offer(queue, bench, 0.500, 30)
    result = boarded(queue, bench)
    # 8 rows in 26 ms are 81 % of the rows a second of 16 in 42 ms; 7 would be less than 80 %.
    assert (len(result.taken), len(result.doomed)) == (8, 0)


def test_what_would_need_a_smaller_batch_than_that_is_given_up() -> None:
    bench, queue = measured(), RequestQueue()
    offer(queue, bench, 0.020)
    offer(queue, bench, 0.500, 30)
    result = boarded(queue, bench)
    assert (len(result.taken), len(result.doomed)) == (16, 1)
    few = RequestQueue()
    offer(few, bench, 0.020, 3)
    assert len(boarded(few, bench).taken) == 3, "alone it is in time"


def test_where_small_batches_cost_nothing_the_head_gets_what_it_needs() -> None:
    bench, queue = measured(fixed_s=0.001, per_row_s=0.050), RequestQueue()
    offer(queue, bench, 0.300, priority=1)
    offer(queue, bench, 2.0, 30)
    result = boarded(queue, bench)
    assert result.taken[0].priority == 1
    assert 3 <= len(result.taken) <= 5
    assert not result.doomed


def test_what_is_late_behind_a_higher_priority_is_left_out_too() -> None:
    bench, queue = measured(), RequestQueue()
    offer(queue, bench, 0.500, 2, priority=1)
    offer(queue, bench, 0.005, 3)
    offer(queue, bench, 0.500, 20)
    result = boarded(queue, bench)
    assert (len(result.taken), len(result.doomed)) == (16, 3)
    assert [request.priority for request in result.taken] == [1, 1, *[0] * 14]


def test_a_batch_is_never_empty() -> None:
    bench, queue = measured(), RequestQueue()
    offer(queue, bench, 0.0005, 3)
    offer(queue, bench, 0.0010)
    result = boarded(queue, bench)
    assert [request.deadline_s for request in result.taken] == [bench.now_s + 0.001]
    assert len(result.doomed) == 3
    assert queue.num_requests == 0


def test_nothing_is_doomed_by_sizes_that_were_never_seen() -> None:
    bench, queue = Bench(1, max_rows=16), RequestQueue()
    bench.run("g0", 0.012, 30)
    offer(queue, bench, 0.030, 16)
    result = boarded(queue, bench)
    # Half of a full batch: larger steps may take what they are predicted to, or hardly longer, and this one will show it.
    assert (len(result.taken), len(result.doomed)) == (8, 0)


def test_full_batches_alone_do_not_doom_what_a_smaller_one_could_answer() -> None:
    bench, queue = Bench(1, max_rows=16), RequestQueue()
    for _ in range(30):
        bench.run("g0", 0.200, 1, rows=16)
    offer(queue, bench, 0.150, 16)
    result = boarded(queue, bench)
    assert (len(result.taken), len(result.doomed)) == (8, 0)


def test_explanations_are_not_steps() -> None:
    bench, queue = measured(), RequestQueue()
    offer(queue, bench, 0.001, 2)
    head = queue.peek()
    assert head is not None
    head.is_explanation = True
    assert len(boarded(queue, bench).taken) == 2


def test_the_byte_limit_holds_when_room_is_filled_again() -> None:
    bench, queue = measured(), RequestQueue()
    offer(queue, bench, 0.005, 4, num_bytes=150)
    offer(queue, bench, 0.500, 2, num_bytes=150)
    offer(queue, bench, 0.600, num_bytes=900)
    result = boarded(queue, bench)
    assert [request.num_bytes for request in result.taken] == [150, 150]
    assert len(result.doomed) == 4
    assert (queue.num_requests, queue.num_rows) == (1, 1)
    assert [request.num_bytes for request in boarded(queue, bench).taken] == [900]


def test_what_is_too_large_for_the_rest_of_the_batch_stays_in_the_queue() -> None:
    bench, queue = measured(), RequestQueue()
    offer(queue, bench, 0.500, num_bytes=150)
    offer(queue, bench, 0.600, num_bytes=900)
    assert [request.num_bytes for request in boarded(queue, bench).taken] == [150]
    assert (queue.num_requests, queue.num_rows) == (1, 1)
    assert [request.num_bytes for request in boarded(queue, bench).taken] == [900]


@pytest.mark.parametrize(("share", "rows"), [(0.1, 1), (0.5, 4), (0.8, 8), (1.0, 16)])
def test_the_least_worthwhile_batch(share: float, rows: int) -> None:
    known = StepTimes()
    assert known.least_worthwhile(16, share) == 16
    for _ in range(20):
        for size in (1, 8, 16):
            known.observe(size, FIXED_S + PER_ROW_S * size)
    assert known.least_worthwhile(16, share) == rows

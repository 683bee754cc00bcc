"""Numbered commands, what the leader waits for, and how batches are cut into micro-batches."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorway.errors import ModelFailed
from tensorway_worker.micro_batches import micro_batches
from tensorway_worker.rank.group_port import GroupLost
from tensorway_worker.rank.in_order import InOrder
from tensorway_worker.rank.pending import SETTLE_S, Pending


@given(st.permutations(range(7)))
def test_work_comes_out_by_number_whatever_the_order_of_arrival(order: list[int]) -> None:
    done: list[int] = []
    in_order = InOrder(lambda work: work())
    in_order.open()
    for number in order:
        in_order.put(number, lambda number=number: done.append(number))
    assert done == list(range(7))


def test_what_comes_early_waits_for_the_opening() -> None:
    done: list[int] = []
    in_order = InOrder(lambda work: work())
    for number in (1, 0):
        in_order.put(number, lambda number=number: done.append(number))
    assert not done
    in_order.open()
    assert done == [0, 1]


def test_a_number_comes_once() -> None:
    in_order = InOrder(lambda work: work())
    in_order.open()
    in_order.put(0, lambda: None)
    in_order.put(2, lambda: None)
    for number in (0, 2):
        with pytest.raises(ValueError, match=f"command {number} came where 1 was expected"):
            in_order.put(number, lambda: None)


def test_many_threads_keep_the_order() -> None:
    done: list[int] = []
    in_order = InOrder(lambda work: work())
    in_order.open()
    numbers = itertools.count()
    lock = threading.Lock()

    def put() -> None:
        for _ in range(200):
            with lock:
                number = next(numbers)
            in_order.put(number, lambda number=number: done.append(number))

    threads = [threading.Thread(target=put) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == list(range(1600))


def test_outcomes_reach_whom_they_belong_to() -> None:
    pending = Pending(1, lambda lost: None)
    first, (one, two) = pending.begin(2)
    pending.resolve(first + 1, {"y": torch.ones(1)})
    pending.fail(first, 1, 1, ModelFailed("no"))
    pending.resolve(first, {})  # too late: it has failed
    assert two.result(1)["y"].item() == 1
    with pytest.raises(ModelFailed, match="no"):
        one.result(1)


def test_a_step_fails_once_all_shards_of_the_stage_have_failed() -> None:
    lost: list[GroupLost] = []
    pending = Pending(2, lost.append)
    number, (outcome,) = pending.begin()
    pending.fail(number, 1, 2, ModelFailed("first"))
    assert not outcome.done()
    pending.fail(number, 1, 3, ModelFailed("second"))
    with pytest.raises(ModelFailed, match="first"):
        outcome.result(1)
    time.sleep(SETTLE_S + 0.2)
    assert not lost


def test_a_shard_that_fails_alone_loses_the_group() -> None:
    lost: list[GroupLost] = []
    pending = Pending(2, lost.append)
    number, _ = pending.begin()
    pending.fail(number, 0, 1, ModelFailed("alone"))
    time.sleep(SETTLE_S + 0.5)
    assert [str(one) for one in lost] == ["rank 1 failed while the other shards of its stage did not: alone"]


def test_a_lost_group_fails_what_waits_and_what_comes() -> None:
    pending = Pending(1, lambda lost: None)
    _, (outcome,) = pending.begin()
    pending.lose(GroupLost("rank 1 was lost"))
    with pytest.raises(GroupLost, match="rank 1"):
        outcome.result(1)
    with pytest.raises(GroupLost, match="rank 1"):
        pending.begin()


@given(st.integers(1, 300), st.integers(1, 8), st.integers(0, 9))
def test_micro_batches_hold_all_rows_as_equally_as_can_be(rows: int, num_stages: int, wanted: int) -> None:
    sizes = micro_batches(rows, num_stages, wanted)
    assert sum(sizes) == rows
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)
    if num_stages == 1:
        assert sizes == (rows,)
    elif wanted:
        assert len(sizes) == min(wanted, rows)
    else:
        assert len(sizes) <= num_stages
        assert len(sizes) == 1 or min(sizes) >= 4

"""Routing, prediction and retry decisions, with numbers only."""

from __future__ import annotations

import pytest

from tensorway.errors import DeadlineExceeded, InvalidRequest, ModelFailed, Overloaded, TensorwayError, Unavailable
from tensorway_orchestrator.retry import RetryBudget, RetryPolicy, should_retry
from tensorway_orchestrator.routing import Candidate, choose, predict_finish_s
from tensorway_orchestrator.step_times import StepTimes


def times(*steps: tuple[int, float], repeat: int = 1) -> StepTimes:
    known = StepTimes()
    for _ in range(repeat):
        for rows, step_s in steps:
            known.observe(rows, step_s)
    return known


def first(n: int) -> int:
    return 0


def test_one_known_size_is_scaled_up_only() -> None:
    known = times((8, 0.010))
    assert known.predict_s(8) == 0.010
    assert known.predict_s(32) == pytest.approx(0.040)
    assert known.predict_s(1) == 0.010
    assert StepTimes().predict_s(5) == 0.0


def test_the_group_that_finishes_first_wins_even_when_it_is_busier() -> None:
    slow = Candidate("slow", 0, 0.0, times((32, 0.100)))
    fast = Candidate("fast", 1, predicted_idle_s=10.020, step_times=times((32, 0.020)))
    assert choose([slow, fast], 32, frozenset(), 10.0, first) is fast


def test_a_group_with_two_batches_in_flight_has_no_room() -> None:
    full = Candidate("full", 2, 0.0, StepTimes())
    assert choose([full], 1, frozenset(), 0.0, first) is None


def test_a_lost_group_is_taken_again_only_where_there_is_no_other() -> None:
    lost, other = Candidate("lost", 0, 0.0, StepTimes()), Candidate("other", 1, 5.0, times((1, 1.0)))
    assert choose([lost, other], 1, frozenset({"lost"}), 0.0, first) is other
    assert choose([lost], 1, frozenset({"lost"}), 0.0, first) is lost


def test_two_random_choices_among_many() -> None:
    many = [Candidate(str(number), 0, float(number), times((1, 1.0))) for number in range(100)]
    picks = iter([70, 30, 0, 0])
    chosen = choose(many, 1, frozenset(), 0.0, lambda n: next(picks))
    assert chosen is not None
    assert chosen.id == "30"


def test_prediction_counts_what_waits_and_what_runs() -> None:
    group = Candidate("g", 1, predicted_idle_s=10.5, step_times=times((32, 0.2), (1, 0.1), repeat=10))
    assert predict_finish_s([group], queued_rows=64, rows=1, max_rows=32, now_s=10.0) == pytest.approx(10.5 + 2 * 0.2 + 0.1, abs=0.01)


def test_nothing_is_predicted_from_too_little() -> None:
    assert predict_finish_s([Candidate("g", 0, 0.0, times((1, 0.1)))], 100, 1, 32, 0.0) is None
    assert predict_finish_s([], 100, 1, 32, 0.0) is None


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (Unavailable("x"), True), (Overloaded("x"), True), (ModelFailed("x"), False), (InvalidRequest("x"), False),
        (DeadlineExceeded("x"), False),
    ],
)
def test_only_lost_attempts_are_tried_again(error: TensorwayError, retried: bool) -> None:
    policy = RetryPolicy()
    assert should_retry(error, 1, 10.0, 1.0, policy, RetryBudget(policy)) is retried


def test_no_retry_past_the_deadline_or_the_last_attempt() -> None:
    policy = RetryPolicy(max_attempts=3)
    assert not should_retry(Unavailable("x"), 1, 1.0, 1.0, policy, RetryBudget(policy))
    assert not should_retry(Unavailable("x"), 3, 9.0, 1.0, policy, RetryBudget(policy))


def test_the_budget_bounds_retries_to_a_share_of_requests() -> None:
    policy = RetryPolicy(budget_share=0.2, min_budget=2.0)
    budget = RetryBudget(policy)
    assert [should_retry(Unavailable("x"), 1, 9.0, 1.0, policy, budget) for _ in range(3)] == [True, True, False]
    for _ in range(5):
        budget.deposit()
    assert should_retry(Unavailable("x"), 1, 9.0, 1.0, policy, budget)

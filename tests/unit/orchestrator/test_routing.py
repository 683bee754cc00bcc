"""Routing, prediction and retry decisions, with numbers only."""

from __future__ import annotations

from collections import Counter

import pytest
from roster_bench import WARM, Bench

from tensorway.errors import DeadlineExceeded, InvalidRequest, ModelFailed, Overloaded, TensorwayError, Unavailable
from tensorway_orchestrator.retry import RetryBudget, RetryPolicy, should_retry
from tensorway_orchestrator.routing_policy import RoutingPolicy
from tensorway_orchestrator.step_times import StepTimes
from tensorway_orchestrator.urn import Urn


def times(*steps: tuple[int, float], repeat: int = 1) -> StepTimes:
    known = StepTimes()
    for _ in range(repeat):
        for rows, step_s in steps:
            known.observe(rows, step_s)
    return known


def test_one_known_size_is_scaled_up_only() -> None:
    known = times((8, 0.010))
    assert known.predict_s(8) == 0.010
    assert known.predict_s(32) == pytest.approx(0.040)
    assert known.predict_s(1) == 0.010
    assert StepTimes().predict_s(5) == 0.0


def test_what_is_certain_of_an_unknown_size_is_not_scaled_up() -> None:
    assert times((8, 0.010)).least_s(32) == 0.010
    assert times((8, 0.010), (16, 0.018), repeat=5).least_s(32) == pytest.approx(0.034, rel=0.01)
    assert StepTimes().least_s(5) == 0.0


def test_step_times_add_up_and_are_taken_out_again() -> None:
    one, other, both = times((4, 0.01), (8, 0.02)), times((2, 0.5), repeat=3), StepTimes()
    both.absorb(one)
    both.absorb(other)
    assert both.num_samples == 5
    both.expel(other)
    assert [both.predict_s(rows) for rows in (1, 4, 9)] == pytest.approx([one.predict_s(rows) for rows in (1, 4, 9)])
    both.expel(one)
    assert (both.num_samples, both.predict_s(4)) == (0, 0.0)


def test_a_seed_is_outvoted_by_as_many_steps() -> None:
    known = StepTimes()
    known.seed(times((1, 1.0), repeat=40), 5.0)
    assert known.num_samples == 0
    assert known.predict_s(1) == pytest.approx(1.0)
    for _ in range(5):
        known.observe(1, 3.0)
    assert known.predict_s(1) == pytest.approx(2.0, abs=0.1)


def test_an_urn_draws_different_items_and_misses_none() -> None:
    urn: Urn[str] = Urn()
    for item in "abcdef":
        urn.add(item)
    urn.discard("b")
    assert len(urn) == 5
    assert "b" not in urn
    seen: Counter[str] = Counter()
    for start in range(5):
        drawn = urn.draw(3, lambda n, start=start: start)  # type: ignore[misc]
        assert len(set(drawn)) == 3
        seen.update(drawn)
    assert seen == dict.fromkeys("acdef", 3)
    assert sorted(urn.draw(9, lambda n: 2)) == list("acdef")


def test_the_group_that_finishes_first_wins_even_when_it_is_busier() -> None:
    bench = Bench(2)
    bench.run("g0", 0.100, 30)
    bench.run("g1", 0.020, 30)
    bench.send("g1")
    assert bench.choose() == "g1"
    bench.send("g1")
    assert bench.choose() == "g0"


def test_a_group_with_two_batches_in_flight_has_no_room() -> None:
    bench = Bench(1)
    first = bench.send("g0")
    assert bench.roster.num_free_places == 1
    bench.send("g0")
    assert bench.choose() is None
    assert (bench.roster.num_free, bench.roster.num_free_places, bench.roster.has_live) == (0, 0, True)
    bench.answer(first, 0.01)
    assert bench.choose() == "g0"


def test_a_lost_group_is_taken_again_only_where_no_other_lives() -> None:
    bench = Bench(2)
    assert bench.choose(1, "g0") == "g1"
    bench.send("g1")
    bench.send("g1")
    assert bench.choose(1, "g0") is None, "the other is full, not gone: wait"
    bench.roster.closed(bench["g1"], bench.now_s)
    assert bench.choose(1, "g0") == "g0"
    assert bench.choose(1, "g0", "never heard of") == "g0"


def test_those_to_avoid_do_not_hide_the_others() -> None:
    bench = Bench(12)
    avoid = [f"g{index}" for index in range(10)]
    assert {bench.choose(1, *avoid) for _ in range(50)} == {"g10", "g11"}


def test_unmeasured_groups_share_the_first_batches() -> None:
    bench = Bench(4)
    for _ in range(4):
        chosen = bench.choose()
        assert chosen is not None
        bench.send(chosen)
    assert all(len(record.in_flight) == 1 for record in bench.roster)


def test_all_groups_are_found_among_many() -> None:
    bench = Bench(100)
    for index in range(100):
        bench.run(f"g{index}", 0.01)
    for _ in range(200):
        chosen = bench.choose()
        assert chosen is not None
        bench.send(chosen)
    assert bench.choose() is None
    assert all(len(record.in_flight) == 2 for record in bench.roster)


def test_an_overdue_group_is_not_taken_for_idle() -> None:
    bench = Bench(2)
    bench.run("g0", 0.010, 3)
    bench.run("g1", 0.030, 3)
    bench.send("g0")
    bench.now_s += 1.0
    assert bench["g0"].wait_s(bench.now_s) == pytest.approx(0.99, abs=0.01)
    assert bench.choose() == "g1"
    bench.send("g1")
    assert bench.choose() == "g1"


def test_the_next_batch_runs_from_when_the_one_before_it_ended() -> None:
    bench = Bench(1)
    bench.run("g0", 0.100, 12)
    first, _ = bench.send("g0"), bench.send("g0")
    sent_s = bench.now_s
    assert bench["g0"].predicted_idle_s == pytest.approx(sent_s + 0.2)
    bench.answer(first, 0.150)
    assert bench["g0"].predicted_idle_s == pytest.approx(sent_s + 0.25, abs=0.02)
    assert bench["g0"].load().num_in_flight == 1


def test_a_group_that_rests_comes_back_by_itself() -> None:
    bench = Bench(1)
    bench.roster.rests(bench["g0"], bench.now_s + 0.5, bench.now_s)
    assert bench.choose() is None
    assert bench.roster.has_live
    assert bench.roster.next_change_s() == pytest.approx(100.5)
    bench.now_s = 100.5
    assert bench.choose() == "g0"
    assert bench.roster.next_change_s() == float("inf")


def zoned(policy: RoutingPolicy) -> Bench:
    bench = Bench(policy=policy, zone="a")
    bench.add("near", "a")
    bench.add("far", "b")
    for name in ("near", "far"):
        bench.run(name, 0.100, 5)
    return bench


def test_the_own_zone_wins_until_another_is_clearly_earlier() -> None:
    bench = zoned(RoutingPolicy(slow_start_s=0.0, cross_zone_s=0.01, cross_zone_share=0.5))
    assert bench.choose() == "near"
    bench.send("near")
    assert bench.choose() == "far", "twice as long is more than 1.5 times and 10 ms"
    bench.now_s += 0.06
    assert bench.choose() == "near", "0.14 s is not"


def test_a_group_without_a_zone_is_never_far() -> None:
    bench = Bench(zone="a")
    bench.add("somewhere", "")
    bench.add("far", "b")
    assert bench.choose() == "somewhere"
    assert {Bench(zone="").add("x", "b").zone, bench["far"].zone} == {"b"}
    assert len(bench.roster.rotation.others) == 1


def test_another_zone_is_better_than_waiting() -> None:
    bench = zoned(WARM)
    bench.send("near")
    bench.send("near")
    assert bench.choose() == "far"


def test_a_new_group_begins_with_the_others_step_times_and_a_small_share() -> None:
    bench = Bench(1, policy=RoutingPolicy(slow_start_s=10.0, first_share=0.1))
    bench.now_s += 20.0
    bench.run("g0", 0.100, 20)
    new = bench.add("new")
    assert new.cost_s(1, bench.now_s) == pytest.approx(1.0)
    assert bench.choose() == "g0"
    bench.now_s += 5.0
    assert new.cost_s(1, bench.now_s) == pytest.approx(0.2)
    bench.now_s += 5.0
    assert new.cost_s(1, bench.now_s) == pytest.approx(0.1)
    bench.run("new", 0.200)
    assert new.step_times.predict_s(1) == pytest.approx(0.1 + 0.1 / 6, rel=0.05)


def test_only_a_group_with_a_history_is_warm_at_once() -> None:
    bench = Bench(policy=RoutingPolicy(slow_start_s=10.0))
    known, new = bench.add("known", has_history=True), bench.add("new")
    assert (known.share(bench.now_s), new.share(bench.now_s)) == (1.0, 0.1)
    bench.roster.closed(known, bench.now_s)
    bench.roster.opened(known, bench.now_s)
    assert known.share(bench.now_s) == 0.1


def test_prediction_counts_what_waits_and_what_runs() -> None:
    bench = Bench(1, max_rows=32)
    for _ in range(10):
        bench.run("g0", 0.2, rows=32)
        bench.run("g0", 0.1, rows=1)
    assert bench.roster.predict_finish_s(0, 1, bench.now_s) == pytest.approx(bench.now_s + 0.1, abs=0.01)
    bench.send("g0", 32)
    # The running batch, two full ones, and its own, which will be full as well.
    assert bench.roster.predict_finish_s(64, 1, bench.now_s) == pytest.approx(bench.now_s + 4 * 0.2, abs=0.02)
    # Half of what the group serves is overtaken by others.
    assert bench.roster.predict_finish_s(64, 1, bench.now_s, 80.0) == pytest.approx(bench.now_s + 6 * 0.2, abs=0.02)


def test_groups_share_what_waits_by_their_speed() -> None:
    bench = Bench(3)
    for name, step_s in (("g0", 0.1), ("g1", 0.1), ("g2", 0.4)):
        bench.run(name, step_s, 100, rows=8)
    for name in ("g0", "g1", "g2"):
        bench.send(name, 8)
    finish_s = bench.roster.predict_finish_s(88, 8, bench.now_s)
    assert finish_s is not None
    # The first is idle in 0.1 s; 80 + 80 + 20 rows a second; the mean step of a batch is 24 / 180 s.
    assert finish_s - bench.now_s == pytest.approx(0.1 + 88 / 180 + 24 / 180, abs=0.03)
    bench.roster.closed(bench["g0"], bench.now_s)
    fewer_s = bench.roster.predict_finish_s(88, 8, bench.now_s)
    assert fewer_s is not None
    assert fewer_s - bench.now_s == pytest.approx(0.1 + 88 / 100 + 16 / 100, abs=0.03)


def test_nothing_is_predicted_from_too_little() -> None:
    bench = Bench(1)
    assert bench.roster.predict_finish_s(100, 1, bench.now_s) is None
    bench.run("g0", 0.1, 9)
    assert bench.roster.predict_finish_s(100, 1, bench.now_s) is None
    bench.run("g0", 0.1)
    assert bench.roster.predict_finish_s(100, 1, bench.now_s) is not None
    bench.roster.leaving(bench["g0"], bench.now_s)
    assert bench.roster.predict_finish_s(100, 1, bench.now_s) is None


def test_a_group_joins_once_and_its_batches_end_once() -> None:
    bench = Bench(1)
    with pytest.raises(ValueError, match="joined already"):
        bench.roster.join("g0")
    batch = bench.send("g0")
    bench.roster.leave(bench["g0"], bench.now_s)
    assert (len(bench.roster), bench.roster.has_live) == (0, False)
    bench.answer(batch, 0.1)
    with pytest.raises(KeyError):
        bench.roster.ended(batch, bench.now_s)


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

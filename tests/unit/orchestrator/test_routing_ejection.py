"""Which groups are left out, for how long, and how they come back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from roster_bench import WARM, Bench

from tensorway_orchestrator.group_record import Reading
from tensorway_orchestrator.routing_policy import EjectionPolicy, RoutingPolicy
from tensorway_orchestrator.standing import Failure, Reason, State

POLICY = WARM.ejection


def serve(bench: Bench, num_batches: int, step_s: float = 0.02) -> None:
    """Batches one after the other, wherever they are sent; all are answered."""
    for _ in range(num_batches):
        record = bench.roster.choose(1, (), bench.now_s)
        assert record is not None
        bench.run(record.id, step_s)


def test_three_failures_in_a_row_eject_and_two_do_not() -> None:
    bench = Bench(3)
    bench.fail("g0", 2)
    bench.run("g0", 0.01)
    bench.fail("g0", 2)
    assert bench["g0"].standing.state is State.SERVING
    bench.fail("g0", 1)
    assert bench["g0"].standing.state is State.EJECTED
    assert bench["g0"].reading(bench.now_s) is Reading.EJECTED
    assert (bench.roster.num_live, bench.roster.num_ejected, bench.roster.num_free) == (3, 1, 2)
    assert bench.roster.ejections[Reason.FAILURES] == 1


def test_what_fails_together_counts_once() -> None:
    bench = Bench(3)
    for _ in range(2):
        batches = [bench.send("g0"), bench.send("g0")]
        bench.now_s += 0.1
        for batch in batches:
            bench.lose(batch)
            bench.roster.failed(batch, Failure.LOST, bench.now_s)
    assert bench["g0"].standing.num_failures == 2
    assert bench["g0"].standing.state is State.SERVING


def test_a_group_that_fails_every_other_time_is_found_by_its_share() -> None:
    bench = Bench(3)
    for _ in range(12):
        bench.fail("g0", 2)
        bench.run("g0", 0.01)
    assert bench.roster.ejections[Reason.FAILURE_SHARE] >= 1
    healthy = Bench(3)
    for _ in range(40):
        healthy.fail("g0", 1)
        healthy.run("g0", 0.01, 2)
    assert healthy.roster.num_ejected == 0


def test_failures_make_a_group_look_slower_at_once() -> None:
    bench = Bench(2)
    for name in ("g0", "g1"):
        bench.run(name, 0.1, 3)
    bench.fail("g0", 1)
    assert bench["g0"].cost_s(1, bench.now_s) == pytest.approx(2 * bench["g1"].cost_s(1, bench.now_s))


def test_a_deadline_speaks_against_a_group_only_where_it_was_generous() -> None:
    bench = Bench(3)
    bench.run("g0", 0.100, 5)
    batch = bench.send("g0")
    bench.now_s += 0.2
    bench.lose(batch, Failure.TIMEOUT)
    assert bench["g0"].standing.num_failures == 0
    batch = bench.send("g0")
    bench.now_s += 0.5
    bench.lose(batch, Failure.TIMEOUT)
    assert bench["g0"].standing.num_failures == 1


def test_before_anything_is_measured_a_timeout_needs_a_whole_second() -> None:
    bench = Bench(3)
    for waited_s, num_failures in ((0.5, 0), (1.5, 1)):
        batch = bench.send("g0")
        bench.now_s += waited_s
        bench.lose(batch, Failure.TIMEOUT)
        assert bench["g0"].standing.num_failures == num_failures


def slow_bench(num_groups: int) -> Bench:
    bench = Bench(num_groups)
    for _ in range(30):
        for index in range(num_groups):
            bench.run(f"g{index}", 0.050)
    return bench


def test_one_slow_step_is_nothing_and_several_are_an_ejection() -> None:
    bench = slow_bench(3)
    bench.run("g0", 60.0)
    bench.run("g0", 60.0)
    assert bench.roster.num_ejected == 0
    bench.run("g0", 0.050, 20)
    bench.run("g0", 0.800, 6)
    assert bench["g0"].standing.state is State.EJECTED
    assert bench.roster.ejections[Reason.SLOWNESS] == 1


def test_machines_that_differ_fourfold_are_no_outliers() -> None:
    bench = Bench(4)
    for _ in range(30):
        for name, step_s in (("g0", 0.05), ("g1", 0.05), ("g2", 0.05), ("g3", 0.2)):
            bench.run(name, step_s)
    assert bench.roster.num_ejected == 0


def test_more_rows_are_no_slowness() -> None:
    bench = Bench(3, max_rows=64)
    for _ in range(10):
        for rows in (1, 4, 8):
            for name in ("g1", "g2"):
                bench.run(name, 0.01 + 0.01 * rows, rows=rows)
    bench.run("g0", 0.65, 20, rows=64)
    assert bench.roster.num_ejected == 0


def test_when_all_are_slow_none_is() -> None:
    bench = slow_bench(3)
    for _ in range(40):
        for index in range(3):
            bench.run(f"g{index}", 2.0)
    assert sum(bench.roster.ejections.values()) == 0, "one after the other becomes slow, and the others with it"


def test_the_only_group_is_never_left_out() -> None:
    bench = Bench(1)
    bench.run("g0", 0.01, 30)
    bench.run("g0", 5.0, 10)
    bench.fail("g0", 20)
    assert bench.choose() == "g0"
    assert sum(bench.roster.ejections.values()) == 0


def test_at_most_half_are_left_out() -> None:
    bench = Bench(5)
    for index in range(5):
        bench.fail(f"g{index}", 3)
    assert bench.roster.num_ejected == 2
    bench.roster.closed(bench["g4"], bench.now_s)
    bench.roster.closed(bench["g3"], bench.now_s)
    assert (bench.roster.num_live, bench.roster.num_ejected) == (3, 1)
    bench.roster.leave(bench["g2"], bench.now_s)
    assert (bench.roster.num_live, bench.roster.num_ejected) == (2, 1)
    serving = bench.choose()
    assert serving is not None
    bench.roster.leave(bench[serving], bench.now_s)
    assert (bench.roster.num_live, bench.roster.num_ejected) == (1, 0)
    assert bench.choose() is not None


def test_a_probe_comes_after_the_back_off_and_brings_the_group_back_slowly() -> None:
    bench = Bench(2, policy=RoutingPolicy(slow_start_s=5.0))
    for name in ("g0", "g1"):
        bench.run(name, 0.02, 300)
    bench.fail("g0", 3)
    assert bench.choose() == "g1"
    back_s = bench.roster.next_change_s()
    assert bench.now_s + 0.5 <= back_s <= bench.now_s + 1.0
    serve(bench, 8)
    bench.now_s = back_s
    assert bench.choose() == "g0"
    assert bench["g0"].reading(bench.now_s) is Reading.PROBING
    probe = bench.send("g0")
    assert bench.choose() == "g1", "one probe at a time"
    bench.answer(probe, 0.02)
    assert bench["g0"].reading(bench.now_s) is Reading.WARMING
    assert bench["g0"].share(bench.now_s) < 0.2


def test_a_probe_that_fails_doubles_the_back_off_up_to_a_bound() -> None:
    bench = Bench(2)
    bench.fail("g0", 3)
    for level in range(1, 9):
        bench.now_s = bench.roster.next_change_s()
        serve_until_probe(bench)
        bench.lose(bench.send("g0"))
        out_s = bench["g0"].standing.back_s - bench.now_s
        longest_s = min(POLICY.max_back_off_s, POLICY.first_back_off_s * 2**level)
        assert longest_s / 2 <= out_s <= longest_s
    assert bench.roster.ejections == {Reason.FAILURES: 1, Reason.PROBE: 8, Reason.FAILURE_SHARE: 0, Reason.SLOWNESS: 0}


def serve_until_probe(bench: Bench) -> None:
    for _ in range(POLICY.probe_gap + 2):
        record = bench.roster.choose(1, (), bench.now_s)
        assert record is not None
        if record.standing.state is State.PROBING:
            return
        bench.run(record.id, 0.001)
    raise AssertionError("no probe was sent")


def test_a_slow_probe_is_no_recovery_and_a_quick_one_forgets_the_illness() -> None:
    bench = slow_bench(3)
    bench.run("g0", 0.800, 10)
    bench.now_s = bench.roster.next_change_s()
    serve_until_probe(bench)
    bench.run("g0", 0.800)
    assert bench.roster.ejections[Reason.PROBE] == 1
    bench.run("g1", 0.050, 30)
    bench.run("g2", 0.050, 30)
    bench.now_s = max(bench.now_s, bench["g0"].standing.back_s)
    serve_until_probe(bench)
    bench.run("g0", 0.050)
    assert bench["g0"].standing.state is State.SERVING
    assert bench["g0"].step_times.predict_s(1) == pytest.approx(0.05, rel=0.2)


def test_what_was_sent_before_says_nothing_afterwards() -> None:
    bench = Bench(3)
    old = bench.send("g0")
    bench.fail("g0", 3)
    bench.now_s = bench.roster.next_change_s()
    bench.roster.choose(1, (), bench.now_s)
    assert bench["g0"].standing.state is State.PROBING
    bench.lose(old)
    assert bench["g0"].standing.state is State.PROBING
    assert bench.roster.ejections[Reason.PROBE] == 0


def test_a_batch_from_before_a_slow_groups_ejection_is_no_probe() -> None:
    bench = slow_bench(3)
    old = bench.send("g0")
    bench.run("g0", 0.800, 10)
    bench.now_s = bench.roster.next_change_s()
    serve_until_probe(bench)
    bench.lose(old)
    assert bench["g0"].standing.state is State.PROBING
    assert bench.roster.ejections[Reason.PROBE] == 0


def test_a_group_where_something_is_stuck_gets_no_probe() -> None:
    bench = Bench(2)
    for name in ("g0", "g1"):
        bench.run(name, 0.02, 20)
    stuck = bench.send("g0")
    bench.now_s += 1.0
    bench.roster.failed(stuck, Failure.TIMEOUT, bench.now_s)
    bench.fail("g0", 2)
    bench.now_s = bench.roster.next_change_s()
    serve(bench, 20)
    assert len(bench["g0"].in_flight) == 1
    bench.roster.ended(stuck, bench.now_s)
    serve_until_probe(bench)


def test_what_avoids_a_group_is_no_probe() -> None:
    bench = Bench(3)
    bench.fail("g0", 3)
    bench.now_s = bench.roster.next_change_s()
    assert {bench.choose(1, "g1") for _ in range(20)} == {"g2"}


def test_probes_do_not_replace_service() -> None:
    bench = Bench(8)
    for index in range(4):
        bench.fail(f"g{index}", 3)
    bench.now_s += 2.0
    chosen = []
    for _ in range(18):
        record = bench.roster.choose(1, (), bench.now_s)
        assert record is not None
        chosen.append(record.standing.state)
        bench.roster.ended(bench.send(record.id), bench.now_s)
    assert chosen.count(State.PROBING) == 2


def test_an_ejection_long_ago_is_forgiven() -> None:
    bench = Bench(2)
    bench.fail("g0", 3)
    bench.now_s = bench.roster.next_change_s()
    serve_until_probe(bench)
    bench.run("g0", 0.02)
    bench.now_s += POLICY.forgive_after_s + 1.0
    bench.fail("g0", 3)
    assert bench["g0"].standing.back_s - bench.now_s <= POLICY.first_back_off_s


def test_a_group_that_left_is_not_ejected() -> None:
    bench = Bench(4)
    bench.fail("g0", 2)
    batch = bench.send("g0")
    bench.roster.leave(bench["g0"], bench.now_s)
    bench.now_s += 0.01
    bench.lose(batch)
    assert sum(bench.roster.ejections.values()) == 0
    assert bench.roster.next_change_s() == float("inf")


def test_a_group_whose_link_is_down_is_ejected_for_when_it_is_back() -> None:
    bench = Bench(2)
    bench.fail("g0", 2)
    batch = bench.send("g0")
    bench.now_s += 0.01
    bench.roster.closed(bench["g0"], bench.now_s)
    bench.lose(batch)
    assert bench.roster.num_ejected == 0
    bench.roster.opened(bench["g0"], bench.now_s)
    assert bench.roster.num_ejected == 1
    assert bench.choose() == "g1"


@settings(max_examples=40, deadline=None)
@given(num_groups=st.integers(2, 12), num_past=st.integers(0, 8), seed=st.integers(0, 1 << 16), gap_s=st.sampled_from((0.001, 0.05, 2.0)))
def test_a_group_that_is_well_again_always_comes_back(num_groups: int, num_past: int, seed: int, gap_s: float) -> None:
    policy = replace(WARM, ejection=EjectionPolicy(max_back_off_s=5.0))
    bench = Bench(num_groups, policy=policy, seed=seed)
    bench.fail("g0", 3)
    for _ in range(num_past):
        bench.now_s = bench["g0"].standing.back_s
        serve_until_probe(bench)
        bench.lose(bench.send("g0"))
    bench.now_s += 5.0
    for _ in range(policy.ejection.probe_gap + 2):
        serve(bench, 1)
        bench.now_s += gap_s
    assert bench["g0"].standing.state is State.SERVING
    assert bench.roster.num_ejected == 0

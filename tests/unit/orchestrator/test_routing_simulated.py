"""The routing benchmark, small: it runs, and what it shows holds."""

from __future__ import annotations

import random

from benchmarks.routing_sim import ROUTERS, Scale, simulate
from benchmarks.sim_overload import HIGH, MANY, Overload
from benchmarks.sim_world import Result

SMALL = Scale(num_groups=40, num_requests=3000, num_part_requests=0, num_decisions=0, overload_steps=0.0, num_small_requests=0)


def p99_s(result: Result) -> float:
    return sorted(result.latencies_s)[int(0.99 * len(result.latencies_s))]


def test_the_tail_is_shorter_than_that_of_other_routers() -> None:
    results = {name: simulate(make, 0.85, SMALL, SMALL.num_requests)[0] for name, make in ROUTERS.items()}
    for name, result in results.items():
        assert len(result.latencies_s) + result.num_lost + result.num_timeouts == SMALL.num_requests
        if name != "ours":
            assert p99_s(results["ours"]) < 0.8 * p99_s(result)
            assert results["ours"].num_timeouts <= result.num_timeouts
    assert results["ours"].num_lost == 0


def test_overload_costs_no_goodput_and_high_priority_is_served_first() -> None:
    run = Overload(MANY, 3.0, 30 * MANY.full_step_s, random.Random(1))
    run.run()
    assert run.goodput() >= 0.9
    high, normal = run.tallies[HIGH], run.tallies[0]
    assert high.in_time >= 0.98 * high.offered
    for tally in (high, normal):
        assert tally.offered == tally.in_time + tally.refused + tally.expired + tally.late
        assert tally.expired + tally.late <= 0.03 * tally.offered

"""`python -m benchmarks.routing_sim`: the orchestrator's routing, simulated; writes benchmarks/routing_sim.md.

Time, groups and callers are simulated, the decisions are the real ones. `--quick` takes seconds and prints instead of writing; `--only
SECTION` runs one of `latency`, `parts`, `small`, `cost`, `overload`, and prints it.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.sim_overload import HIGH, MANY, ONE, Overload
from benchmarks.sim_routers import Chance, FewConnections, LeastConnections, Ours, RoundRobin, picker
from benchmarks.sim_world import MEAN_STEP_S, Illness, Result, Router, SimGroup, World
from tensorway_orchestrator.roster import Roster
from tensorway_orchestrator.routing_policy import EjectionPolicy, RoutingPolicy

ZONES: Final = ("a", "b", "c")
OWN_ZONE: Final = "a"
ILL_SHARE: Final = 0.1
SEED: Final = 7
MakeRouter = Callable[[random.Random], Router]

ROUTERS: Final[dict[str, MakeRouter]] = {
    "ours": lambda source: Ours(source, RoutingPolicy(), OWN_ZONE),
    "least connections of two": LeastConnections,
    "round robin": RoundRobin,
    "random": Chance,
}
ILLNESSES: Final = {Illness.HUNG: "hangs", Illness.SLOW: "ten times as slow", Illness.FAILING: "loses all"}
#: Ours, with one part taken out.
PARTS: Final[dict[str, RoutingPolicy]] = {
    "ours": RoutingPolicy(),
    "one draw": RoutingPolicy(num_draws=1),
    "two draws": RoutingPolicy(num_draws=2),
    "eight draws": RoutingPolicy(num_draws=8),
    "no ejection": RoutingPolicy(ejection=EjectionPolicy(max_ejected_share=0.0)),
    "no slow start": RoutingPolicy(slow_start_s=0.0),
    "zones alike": RoutingPolicy(cross_zone_s=0.0, cross_zone_share=0.0),
}


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is simulated."""

    num_groups: int
    num_requests: int
    num_part_requests: int
    num_decisions: int
    overload_steps: float
    num_small_requests: int


FULL: Final = Scale(1000, 1_000_000, 200_000, 20_000, 1000.0, 20_000)
QUICK: Final = Scale(100, 10_000, 3_000, 2_000, 60.0, 2_000)


def simulate(make: MakeRouter, load: float, scale: Scale, num_requests: int) -> tuple[Result, Router]:
    """One run, with the same groups, illnesses and arrivals for every router."""
    source = random.Random(SEED)
    groups = [SimGroup(index, ZONES[index % len(ZONES)], source.uniform(1.0, 4.0)) for index in range(scale.num_groups)]
    rate = load * sum(1.0 / (MEAN_STEP_S * group.speed) for group in groups)
    router = make(random.Random(SEED + 1))
    world = World(groups, router, rate, num_requests, random.Random(SEED + 2), OWN_ZONE)
    illnesses = tuple(Illness)
    for number, index in enumerate(source.sample(range(scale.num_groups), int(ILL_SHARE * scale.num_groups))):
        from_s = source.uniform(0.05, 0.7) * num_requests / rate
        world.fall_ill(groups[index], illnesses[number % len(illnesses)], from_s, from_s + source.uniform(0.05, 0.25) * num_requests / rate)
    return world.run(), router


def row(name: str, load: float, result: Result) -> str:
    """Latencies in milliseconds, the rest in requests."""
    total = len(result.latencies_s) + result.num_lost + result.num_timeouts
    return (
        f"| {load:.0%} | {name} | {_ms(result, 0.5)} | {_ms(result, 0.99)} | {_ms(result, 0.999)} | {result.num_timeouts} "
        f"({result.num_timeouts / total:.3%}) | {result.num_lost} | {result.num_retries} | {result.num_far / result.num_sent:.0%} |"
    )


def _ms(result: Result, quantile: float) -> str:
    latencies = sorted(result.latencies_s)
    return f"{latencies[min(len(latencies) - 1, int(quantile * len(latencies)))] * 1e3:.0f}"


LATENCY_HEAD: Final = (
    "| load | router | p50 ms | p99 ms | p99.9 ms | past the deadline | lost | attempts lost and retried | to other zones |",
    "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def latency(scale: Scale) -> Iterator[str]:
    yield "## Latency beside other routers"
    yield ""
    yield f"{scale.num_groups:,} groups, {scale.num_requests:,} requests in each row."
    yield ""
    yield from LATENCY_HEAD
    for load in (0.7, 0.85, 0.95):
        for name, make in ROUTERS.items():
            result, router = simulate(make, load, scale, scale.num_requests)
            yield row(name, load, result)
            if isinstance(router, Ours):
                ejections = ", ".join(f"{reason.value} {number}" for reason, number in router.roster.ejections.items())
    yield ""
    yield f"Ejections of ours at 95 %, by reason: {ejections}."


def parts(scale: Scale) -> Iterator[str]:
    yield "## What each part is worth"
    yield ""
    yield f"{scale.num_groups:,} groups, {scale.num_part_requests:,} requests in each row: a shorter run, so illnesses are shorter, too."
    yield "The first row routes by connections, but lets requests wait here while the groups that it draws have two."
    yield ""
    yield from LATENCY_HEAD
    yield row("least connections, at most two", 0.85, simulate(FewConnections, 0.85, scale, scale.num_part_requests)[0])
    for name, policy in PARTS.items():
        result, _ = simulate(lambda source, policy=policy: Ours(source, policy, OWN_ZONE), 0.85, scale, scale.num_part_requests)  # type: ignore[misc]
        yield row(name, 0.85, result)


def cost(scale: Scale) -> Iterator[str]:
    yield "## Cost of a decision"
    yield ""
    yield (
        "CPU µs; the best of five runs. Half of the groups are busy (all, for `predict_finish_s`). A batch is `choose`, "
        "`began`, `ended` and `observed`."
    )
    yield ""
    yield "| groups | choose | a batch | predict_finish_s | join, open and leave |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    for num_groups in (1, 10, 100, 1_000, 10_000):
        best = [min(times) for times in zip(*(_cost_us(num_groups, scale.num_decisions) for _ in range(5)), strict=True)]
        yield f"| {num_groups:,} | " + " | ".join(f"{us:.1f}" for us in best) + " |"


def _cost_us(num_groups: int, num: int) -> tuple[float, ...]:
    source = random.Random(SEED)
    roster = Roster(8, picker(source), zone=OWN_ZONE)
    now_s = 0.0
    for index in range(num_groups):
        record = roster.join(str(index), ZONES[index % len(ZONES)], has_history=True)
        roster.opened(record, now_s)
        for rows in (1, 4, 8):
            batch = roster.began(record, rows, now_s)
            roster.ended(batch, now_s)
            roster.observed(batch, 0.02 + 0.005 * rows, 0.0, now_s + 0.05)
    in_flight = [roster.began(record, 4, now_s) for record, _ in zip(list(roster), range(num_groups // 2), strict=False)]
    started = time.process_time()
    for _ in range(num):
        roster.choose(4, (), now_s)
    chosen = time.process_time()
    for number in range(num):
        now_s += 1e-5
        record_or_none = roster.choose(1 + number % 8, (), now_s)
        assert record_or_none is not None
        in_flight.append(roster.began(record_or_none, 1 + number % 8, now_s))
        done = in_flight[number]
        roster.ended(done, now_s)
        roster.observed(done, 0.02 + 0.005 * done.rows, 0.0, now_s)
    sent = time.process_time()
    busy = [roster.began(record, 4, now_s) for record in roster if not record.in_flight]
    filled = time.process_time()
    for _ in range(num):
        roster.predict_finish_s(64, 4, now_s)
    predicted = time.process_time()
    for number in range(num):
        record = roster.join(f"new {number}", OWN_ZONE)
        roster.opened(record, now_s)
        roster.leave(record, now_s)
    joined = time.process_time()
    assert len(busy) <= num_groups
    return tuple(spent / num * 1e6 for spent in (chosen - started, sent - chosen, predicted - filled, joined - predicted))


def overload(scale: Scale) -> Iterator[str]:
    yield "## Overload"
    yield ""
    yield (
        "Open loop; a fifth of the requests are of high priority. *Many*: 16 groups, the slowest half as quick as the quickest; 10 ms + "
        "2 ms a row, 16 rows; deadlines 4 to 8 full steps after arrival. *One*: one group, 10 ms + 60 ms a row, 32 rows; deadlines 3 s, or "
        "1.55 full steps, after arrival. Goodput is what was answered in time, as a share of what the groups serve in full batches. The "
        "rest are shares of the offered requests."
    )
    yield ""
    yield "| groups | offered | admission | goodput | priority | in time | refused at once | given up in the queue | run, but late |"
    yield "| --- | ---: | --- | ---: | --- | ---: | ---: | ---: | ---: |"
    for scene_name, scene in (("many", MANY), ("one", ONE)):
        for load, is_on in ((1.0, True), (2.0, True), (3.0, True), (3.0, False)):
            run = Overload(scene, load, scale.overload_steps * scene.full_step_s, random.Random(SEED), is_on)
            run.run()
            for priority, name in ((HIGH, "high"), (0, "normal")):
                tally = run.tallies[priority]
                shares = (tally.in_time, tally.refused, tally.expired, tally.late)
                yield (
                    f"| {scene_name} | {load:.0f}x | {'by prediction' if is_on else 'none'} | {run.goodput():.1%} | {name} | "
                    + " | ".join(f"{number / tally.offered:.1%}" for number in shares) + " |"
                )


def small(scale: Scale) -> Iterator[str]:
    yield "## A small mesh"
    yield ""
    yield f"Four groups, one of which is ill for half of the time; {scale.num_small_requests:,} requests in each row, 60 % load, no zones."
    yield ""
    yield "| illness | router | p50 ms | p99 ms | past the deadline | attempts lost and retried |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    routers: dict[str, MakeRouter] = {
        "ours": lambda source: Ours(source, RoutingPolicy(), ""),
        "ours, no ejection": lambda source: Ours(source, PARTS["no ejection"], ""),
        "least connections of two": LeastConnections,
    }
    for illness, words in ILLNESSES.items():
        for name, make in routers.items():
            groups = [SimGroup(index, "", 1.0 + index % 3) for index in range(4)]
            rate = 0.6 * sum(1.0 / (MEAN_STEP_S * group.speed) for group in groups)
            world = World(groups, make(random.Random(SEED)), rate, scale.num_small_requests, random.Random(SEED + 1))
            world.fall_ill(groups[0], illness, 0.2 * scale.num_small_requests / rate, 0.7 * scale.num_small_requests / rate)
            result = world.run()
            yield f"| {words} | {name} | {_ms(result, 0.5)} | {_ms(result, 0.99)} | {result.num_timeouts} | {result.num_retries} |"


SECTIONS: Final[dict[str, Callable[[Scale], Iterator[str]]]] = {
    "latency": latency, "parts": parts, "small": small, "cost": cost, "overload": overload,
}
HEAD: Final = """# Routing, simulated

`make bench-routing`, or `python -m benchmarks.routing_sim` (`--quick`: seconds). Simulated time; the decisions are the orchestrator's own
modules (`roster`, `routing`, `standing`, `forecast`, `outlook`, `boarding`). [docs/routing.md](../docs/routing.md) explains the figures.

The mesh: steps take 20 ms + 5 ms for each of 1 to 8 rows, times 1 to 4 according to the group (even over the groups), times log-normal
noise (sigma 0.15); three zones (0.5 ms to the own one and back, 2 ms to the others); Poisson arrivals at a share of what healthy groups can
serve; one request is one batch, its deadline is 2 s after arrival, and it has three attempts. A tenth of the groups fall ill once, for 5 to
25 % of the run, evenly: hang, take ten times as long, lose every batch after 1 ms, or lose their link (after which ten steps take three
times as long). All routers see links, and retry alike; the others hand every request on at once, and groups keep what waits.
Percentiles are those of what was answered: a router that answers only what its quick groups got has a fine median.
""".splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=SECTIONS)
    wanted = parser.parse_args()
    scale = QUICK if wanted.quick else FULL
    lines: list[str] = []
    for name, section in SECTIONS.items():
        if wanted.only in (None, name):
            for line in section(scale):
                print(line, flush=True)
                lines.append(line)
            lines.append("")
    if not wanted.quick and wanted.only is None:
        Path(__file__).with_suffix(".md").write_text("\n".join([*HEAD, "", *lines]).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

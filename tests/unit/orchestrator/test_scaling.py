"""Loads and the number of replicas that they lead to: pure code, with a clock that is an argument."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.loads import ModelLoad, decode_loads, encode_loads
from tensorway.resilience import Scaling
from tensorway_orchestrator.load import CLEAR_WITHIN_S, LaneMeter, LaneView, Rate
from tensorway_orchestrator.load_board import has_changed
from tensorway_orchestrator.scaling import ACTIVE_S, Demand, Scale, demand_of

RULE = Scaling(0, 8, 0.7, 30.0)


def meter(max_rows: int = 8, *, generates: bool = False, target: float = 0.5) -> LaneMeter:
    return LaneMeter("m", "r", max_rows, generates, target, 0.0, lambda: None)


def view(
    num_groups: int = 1, *, waiting: int = 0, running: int = 0, num_open: int = 0, replica_rows_per_s: float = 100.0
) -> LaneView:
    return LaneView(num_groups, waiting, running, num_open, replica_rows_per_s)


def load(*, need: float = 0.0, num_open: int = 0, idle_s: float = 0.0, is_called: bool = False, arrival: float = 0.0) -> ModelLoad:
    return ModelLoad("m", "r", arrival, arrival, 0.0, 0.0, 1, 0.0, 0, num_open, need, idle_s, is_called)


def feed(metered: LaneMeter, rows_per_s: float, begin_s: float, end_s: float, chance: random.Random) -> None:
    """Requests of one row that come by chance."""
    now_s = begin_s
    while (now_s := now_s + chance.expovariate(rows_per_s)) < end_s:
        metered.arrived(1, now_s)


# --- what a lane measures


def test_a_rate_is_that_of_what_is_counted_and_fades() -> None:
    rate = Rate(10.0)
    for tick in range(1000):
        rate.add(3.0, tick * 0.1)
    assert rate.read(99.9) == pytest.approx(30.0, rel=0.02)
    assert rate.read(109.9) == pytest.approx(30.0 / math.e, rel=0.02)
    rate.add(0.0, 50.0)  # a clock that two callers read in another order
    assert rate.read(109.9) == pytest.approx(30.0 / math.e, rel=0.02)


@pytest.mark.parametrize(("rows_per_s", "needed"), [(20.0, 0.4), (100.0, 2.0), (400.0, 8.0)])
def test_the_need_is_what_the_utilisation_law_says(rows_per_s: float, needed: float) -> None:
    """At 100 rows a second for each replica and a target of one half."""
    metered = meter()
    feed(metered, rows_per_s, 0.0, 60.0, random.Random(3))
    read = metered.read(view(), 60.0)
    assert read.predicted_replicas == pytest.approx(needed, rel=0.25)
    assert read.arrival_rows_per_s == pytest.approx(rows_per_s, rel=0.25)


def test_a_rise_is_seen_within_seconds_and_chance_is_none() -> None:
    metered, chance = meter(), random.Random(4)
    feed(metered, 10.0, 0.0, 60.0, chance)
    before = metered.read(view(), 60.0)
    feed(metered, 200.0, 60.0, 63.0, chance)
    after = metered.read(view(), 63.0)
    assert before.demand_rows_per_s < 16.0
    assert after.demand_rows_per_s > 2 * after.arrival_rows_per_s - 20.0 > 80.0


def test_what_waits_beyond_a_batch_for_each_group_adds_to_the_need() -> None:
    metered = meter()
    metered.arrived(1, 0.0)
    none = metered.read(view(2, waiting=16), 30.0).predicted_replicas
    much = metered.read(view(2, waiting=16 + int(100 * CLEAR_WITHIN_S)), 30.0).predicted_replicas
    assert much - none == pytest.approx(1.0)


def test_utilisation_queue_time_and_the_rate_of_full_groups() -> None:
    """Steps of 40 ms on 4 rows, twenty a second on two groups: four tenths each, and 100 rows in a second of computing."""
    metered = meter(4)
    for tick in range(2000):
        metered.answered(4, 0.04, 0.5, tick * 0.05)
    calm = metered.read(view(2, replica_rows_per_s=500.0), 100.0)
    assert calm.utilisation == pytest.approx(0.4, rel=0.05)
    assert calm.queue_s == pytest.approx(0.5, rel=0.01)
    assert calm.replica_rows_per_s == 500.0  # batches could be larger than they were
    full = metered.read(view(1, waiting=400, replica_rows_per_s=500.0), 100.0)
    assert full.utilisation == pytest.approx(0.8, rel=0.05)
    for tick in range(2000):
        metered.answered(4, 0.04, 0.5, 100.0 + tick * 0.04)
    full = metered.read(view(1, waiting=400, replica_rows_per_s=500.0), 180.0)
    assert full.replica_rows_per_s == pytest.approx(100.0, rel=0.05)  # they are as large as they can be: this is the truth


def test_what_a_replica_serves_is_remembered_when_the_last_has_gone() -> None:
    metered = meter()
    metered.read(view(), 0.0)
    metered.arrived(50, 500.0)
    assert metered.read(view(0, replica_rows_per_s=0.0), 500.0).replica_rows_per_s == 100.0


def test_places_are_what_generation_needs() -> None:
    metered = meter(4, generates=True)
    for tick in range(60):
        read = metered.read(view(2, waiting=4, running=8, num_open=12), float(tick))
    assert read.predicted_replicas == pytest.approx(12 / (4 * 0.5), rel=0.01)
    assert read.utilisation == 1.0


def test_idleness_begins_when_the_last_request_is_answered() -> None:
    metered = meter()
    metered.arrived(1, 10.0)
    assert metered.read(view(num_open=1), 90.0).idle_s == 0.0
    assert metered.read(view(), 95.0).idle_s == 5.0


def test_a_cold_model_calls_once_until_somebody_wants_a_replica() -> None:
    calls: list[None] = []
    metered = LaneMeter("m", "r", 8, False, 0.7, 0.0, lambda: calls.append(None))
    metered.arrived(1, 1.0)
    metered.cool(True)
    assert not metered.read(view(0), 1.0).is_called
    metered.arrived(1, 2.0)
    metered.arrived(1, 3.0)
    assert (len(calls), metered.read(view(0), 3.0).is_called) == (1, True)
    metered.cool(False)
    assert not metered.read(view(0), 3.0).is_called


# --- what orchestrators tell each other


def test_loads_travel_and_add_up() -> None:
    one, other = load(need=1.25, idle_s=7.0), load(need=0.5, idle_s=40.0)
    assert decode_loads(encode_loads((one, other))) == (one, other)
    assert demand_of([(one, 3.0), (other, 0.0)]) == Demand(1.75, False, 10.0)
    assert demand_of([]) == Demand(0.0, False, math.inf)


def test_who_was_active_when_it_last_spoke_still_is() -> None:
    assert demand_of([(load(idle_s=ACTIVE_S / 2), 500.0)]).idle_s == 0.0
    assert demand_of([(load(is_called=True, idle_s=90.0), 0.0)]).is_called
    assert demand_of([(load(num_open=1), 0.0)]).is_called


def test_only_what_matters_is_told() -> None:
    told = (load(need=1.0, arrival=100.0, idle_s=50.0),)
    assert not has_changed(told, (load(need=1.05, arrival=95.0, idle_s=51.0),))
    assert has_changed(told, (load(need=1.2, arrival=100.0, idle_s=50.0),))
    assert has_changed(told, (load(need=1.0, arrival=80.0, idle_s=50.0),))
    assert has_changed(told, (load(need=1.0, arrival=100.0, idle_s=0.0),))
    assert has_changed(told, (load(need=1.0, arrival=100.0, idle_s=50.0, is_called=True),))
    assert has_changed(told, ()) and has_changed((), told)


# --- the number of replicas


_DEMANDS = st.builds(Demand, st.floats(0.0, 500.0), st.booleans(), st.one_of(st.just(0.0), st.floats(0.0, 100.0), st.just(math.inf)))


@given(
    st.integers(0, 5), st.integers(0, 10), st.integers(0, 20), st.floats(1.0, 60.0),
    st.lists(st.tuples(_DEMANDS, st.integers(0, 20), st.floats(0.0, 100.0)), min_size=1, max_size=30),
)
def test_the_number_stays_within_its_bounds_and_moves_gently(
    lowest: int, more: int, current: int, idle_s: float, events: list[tuple[Demand, int, float]]
) -> None:
    rule = Scaling(lowest, max(1, lowest + more), 0.7, idle_s)
    scale, now_s = Scale(rule, 0.0), 0.0
    for demand, num_ready, pause_s in events:
        now_s += pause_s
        wanted = scale.decide(demand, current, num_ready, now_s)
        assert rule.min_replicas <= wanted <= rule.max_replicas
        if rule.min_replicas <= current <= rule.max_replicas:
            assert wanted <= max(current, 2 * num_ready, num_ready + 2)
            assert wanted >= current - 1 or (wanted == rule.min_replicas and not demand.is_called)
        current = wanted


@given(st.floats(0.05, 7.0), st.integers(0, 2**32))
def test_a_steady_load_with_noise_never_flaps(need: float, seed: int) -> None:
    """Up it goes and there it stays, through ten times the window of calm."""
    chance, scale, current = random.Random(seed), Scale(RULE, 0.0), 1
    numbers = []
    for second in range(300):
        current = scale.decide(Demand(need * chance.uniform(0.95, 1.05), False, 0.0), current, current, float(second))
        numbers.append(current)
    assert numbers == sorted(numbers)
    assert need / 1.2 <= numbers[-1] <= math.ceil(need)


@given(st.floats(0.1, 100.0), st.integers(1, 20))
def test_a_step_of_load_settles(need: float, start_s: int) -> None:
    """Replicas take `start_s` to start; the number is right after a few of these, and falls one by one when the load is gone."""
    rule = Scaling(1, 64, 0.7, 30.0)
    scale, current, starting, ready = Scale(rule, 0.0), 1, [(0, 1)], 1
    for second in range(12 * start_s + 12):
        ready = max((number for at_s, number in starting if at_s <= second), default=1)
        wanted = scale.decide(Demand(need, True, 0.0), current, ready, float(second))
        if wanted != current:
            starting.append((second + start_s, wanted))
            current = wanted
    assert current == min(64, max(1, math.ceil(need / 1.1)))
    begin_s = 12 * start_s + 12
    for second in range(begin_s, begin_s + 31 * 64):
        wanted = scale.decide(Demand(0.01, True, 0.0), current, current, float(second))
        assert wanted >= current - 1
        current = wanted
    assert current == 1


def test_one_goes_after_a_whole_window_of_calm() -> None:
    scale = Scale(RULE, 0.0)
    calm, busy = Demand(0.85, True, 0.0), Demand(1.8, True, 0.0)
    assert [scale.decide(calm, 2, 2, float(second)) for second in (0, 29)] == [2, 2]
    assert scale.decide(busy, 2, 2, 29.5) == 2
    assert [scale.decide(calm, 2, 2, float(second)) for second in (30, 59, 60)] == [2, 2, 1]
    assert scale.decide(calm, 1, 1, 1000.0) == 1  # the last one goes without requests only


def test_a_hand_that_changes_the_number_starts_the_calm_anew_once_all_serve() -> None:
    scale, calm = Scale(RULE, 0.0), Demand(0.5, True, 0.0)
    assert [scale.decide(calm, 2, 2, 0.0), scale.decide(calm, 4, 2, 29.0), scale.decide(calm, 4, 4, 31.0)] == [2, 4, 4]
    assert [scale.decide(calm, 4, 4, 60.0), scale.decide(calm, 4, 4, 61.0)] == [4, 3]


def test_to_zero_without_requests_and_back_with_the_first() -> None:
    scale = Scale(RULE, 0.0)
    assert scale.decide(Demand(0.4, False, 29.0), 3, 3, 100.0) == 3  # they have only begun to serve
    assert scale.decide(Demand(0.4, False, 60.0), 3, 3, 129.0) == 3
    assert scale.decide(Demand(0.4, False, 30.0), 3, 3, 130.0) == 0
    assert scale.decide(Demand(0.4, False, 0.0), 0, 0, 132.0) == 0  # what averages remember of the past starts nothing
    assert scale.decide(Demand(0.0, True, 0.0), 0, 0, 133.0) == 1


def test_what_still_starts_is_not_idle() -> None:
    scale, silence = Scale(RULE, 0.0), Demand(0.0, False, 1000.0)
    assert [scale.decide(silence, 1, number, at_s) for number, at_s in ((0, 500.0), (1, 501.0), (1, 530.0), (1, 531.0))] == [1, 1, 1, 0]


def test_without_requests_the_least_number_is_left() -> None:
    scale, silence = Scale(Scaling(2, 8, 0.7, 30.0), 0.0), Demand(0.4, False, 1000.0)
    assert [scale.decide(silence, 5, 5, at_s) for at_s in (100.0, 129.0, 130.0)] == [5, 5, 2]


def test_who_decides_anew_does_not_take_silence_for_idleness() -> None:
    """After another orchestrator's end, or the registry's, nobody has spoken yet."""
    scale = Scale(RULE, 1000.0)
    assert [scale.decide(Demand(0.0, False, math.inf), 2, 2, 1000.0 + after_s) for after_s in (0.0, 29.0)] == [2, 2]
    assert scale.decide(Demand(0.0, False, math.inf), 2, 2, 1030.0) == 0

"""Models that scale, as the gateway sees them: their state, their load, and what a person may want of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tensorway.errors import FailedPrecondition, InvalidRequest
from tensorway.loads import ModelLoad
from tensorway.registry.port import Registration
from tensorway.resilience import Scaling
from tensorway.signature import Batching, RevisionSpec, Signature
from tensorway_gateway.load import sum_loads
from tensorway_gateway.models import DORMANT, Desired, GroupReport, Model, ModelState, build_models, published_revision
from tensorway_gateway.scale import MAX_REPLICAS, check_replicas, with_replicas

SPEC = RevisionSpec("m", "a" * 64, "1", "", "python", Signature((), ()), Batching(), 1, 30.0, scaling=Scaling(0, 4))


def model(spec: RevisionSpec, num_wanted: int, num_ready: int = 0, *reports: GroupReport) -> Model:
    groups = [Registration("group", f"g{n}", "e", {"model": "m", "revision": spec.revision}) for n in range(num_ready)]
    published = {("m", spec.revision): published_revision(spec)}
    return build_models([Desired("m", spec.revision, num_wanted)], published, groups, reports)["m"]


def said(arrival: float, queue_s: float, busy: float, need: float, revision: str = SPEC.revision) -> ModelLoad:
    return ModelLoad("m", revision, arrival, arrival, queue_s, busy, 2, 50.0, 3, 4, need, 0.0, False)


def test_a_model_that_sleeps_says_so() -> None:
    asleep = model(SPEC, 0).serving
    assert (asleep.state, asleep.reason, asleep.is_dormant) == (ModelState.UNAVAILABLE, DORMANT, True)
    failed = GroupReport("m", SPEC.revision, "backing_off", "it fell over")
    assert model(SPEC, 0, 0, failed).serving.reason == DORMANT  # what failed once will be tried again with the first request


def test_only_a_model_that_starts_by_itself_sleeps() -> None:
    by_hand = model(replace(SPEC, scaling=None), 0).serving
    assert (by_hand.reason, by_hand.is_dormant) == ("no replica of it is wanted", False)
    assert not model(SPEC, 1).serving.is_dormant
    draining = model(SPEC, 0, 1).serving
    assert (draining.state, draining.is_dormant) == (ModelState.READY, False)


def test_loads_are_summed_over_orchestrators() -> None:
    load = sum_loads(model(SPEC, 3, 2), [
        ("o1", [said(30.0, 0.1, 0.9, 1.2)]), ("o2", [said(10.0, 0.5, 0.7, 0.4), said(99.0, 9.0, 2.0, 9.0, "b" * 64)]), ("o3", []),
    ])
    assert (load.arrival_rows_per_s, load.waiting_rows, load.num_open) == (40.0, 6, 8)
    assert load.queue_s == pytest.approx(0.2)
    assert load.utilisation == pytest.approx(0.8)
    assert load.predicted_replicas == pytest.approx(1.6)
    assert [id for id, _ in load.parts] == ["o1", "o2"]


def test_a_model_that_nobody_speaks_of_has_no_load() -> None:
    load = sum_loads(model(SPEC, 0), [])
    assert (load.arrival_rows_per_s, load.queue_s, load.utilisation, load.predicted_replicas) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("replicas", [0, 4])
def test_a_person_may_choose_within_bounds(replicas: int) -> None:
    check_replicas(SPEC, replicas)
    check_replicas(replace(SPEC, scaling=None), 100 * replicas)


def test_a_person_may_not_choose_outside_of_them() -> None:
    with pytest.raises(FailedPrecondition, match="between 0 and 4, and 5 is outside"):
        check_replicas(SPEC, 5)
    with pytest.raises(FailedPrecondition, match="between 1 and 4, and 0 is outside"):
        check_replicas(replace(SPEC, scaling=Scaling(1, 4)), 0)
    with pytest.raises(InvalidRequest, match="more than"):
        check_replicas(replace(SPEC, scaling=None), MAX_REPLICAS + 1)


def test_only_the_number_is_changed() -> None:
    document = json.dumps({"model": "m", "revision": SPEC.revision, "replicas": 1, "other": "kept"}).encode()
    assert json.loads(with_replicas(SPEC, 3, document)) == {
        "model": "m", "revision": SPEC.revision, "replicas": 3, "other": "kept", "by_hand": True,
    }
    for present in (None, json.dumps({"model": "m", "revision": "b" * 64, "replicas": 1}).encode()):
        with pytest.raises(FailedPrecondition, match="changing its revision"):
            with_replicas(SPEC, 3, present)

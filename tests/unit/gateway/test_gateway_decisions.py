"""Admission, the choice of an orchestrator, and the state of models: pure code, tested with numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.deadline import Deadline
from tensorway.errors import DeadlineExceeded, InvalidRequest, NotFound, Overloaded
from tensorway.registry.port import Registration
from tensorway.signature import ROWS, Batching, RevisionSpec, Signature, TensorSpec
from tensorway.tensors import DataType
from tensorway_gateway.admission import Admission, Limits
from tensorway_gateway.choice import LOAD_FACTOR, MIN_LIMIT, choose, order
from tensorway_gateway.models import Desired, GroupReport, Model, ModelState, build_models, published_revision

_IDS = st.sets(st.text("abcdef0123456789", min_size=1, max_size=6), min_size=1, max_size=8)


# --- admission


def test_places_and_bytes_are_counted_and_given_back() -> None:
    admission = Admission(Limits(max_requests=2, max_bytes=100, max_timeout_s=10))
    admission.admit(60)
    with pytest.raises(Overloaded, match="41 more exceed its limit of 100"):
        admission.admit(41)
    admission.admit(40)
    with pytest.raises(Overloaded, match="2 requests in flight") as caught:
        admission.admit(0)
    assert caught.value.retry_after_s == pytest.approx(0.01)
    admission.release(60, 2.0)
    admission.release(40, 2.0)
    assert (admission.num_requests, admission.num_bytes) == (0, 0)


def test_the_time_to_come_back_follows_the_time_requests_take() -> None:
    admission = Admission(Limits(max_requests=1, max_bytes=100, max_timeout_s=10))
    for _ in range(200):
        admission.admit(1)
        admission.release(1, 0.5)
    admission.admit(1)
    with pytest.raises(Overloaded) as caught:
        admission.admit(1)
    assert caught.value.retry_after_s == pytest.approx(0.5, rel=0.01)


def test_a_request_above_the_whole_budget_runs_when_it_is_alone() -> None:
    admission = Admission(Limits(max_requests=9, max_bytes=100, max_timeout_s=10))
    admission.admit(1000)
    with pytest.raises(Overloaded):
        admission.admit(1)
    admission.release(1000, 0.1)
    admission.admit(1)


@pytest.mark.parametrize(
    ("call_at_s", "timeout_s", "expected_at_s"),
    [(None, None, 107.0), (103.0, None, 103.0), (None, 2.0, 102.0), (103.0, 2.0, 102.0), (101.0, 2.0, 101.0), (500.0, None, 110.0)],
)
def test_the_earliest_limit_is_the_deadline(call_at_s: float | None, timeout_s: float | None, expected_at_s: float) -> None:
    admission = Admission(Limits(1, 1, max_timeout_s=10))
    call = None if call_at_s is None else Deadline(call_at_s)
    assert admission.deadline(call, timeout_s, 7.0, 100.0).at_s == expected_at_s


def test_a_deadline_that_has_passed_is_the_gateways_to_report() -> None:
    with pytest.raises(DeadlineExceeded) as caught:
        Admission(Limits(1, 1, 10)).deadline(Deadline(99.0), None, 7.0, 100.0)
    assert caught.value.hop == "gateway"


# --- choice


@given(_IDS, st.text(max_size=10))
def test_one_that_leaves_moves_only_its_own_models(ids: set[str], model: str) -> None:
    preferred = order(model, ids)
    assert sorted(preferred) == sorted(ids)
    for gone in ids:
        assert order(model, ids - {gone}) == tuple(item for item in preferred if item != gone)


@given(_IDS, st.data())
def test_the_choice_is_the_first_below_the_limit(ids: set[str], data: st.DataObject) -> None:
    preferred = order("model", ids)
    in_flight = {item: data.draw(st.integers(0, 500)) for item in data.draw(st.sets(st.sampled_from(sorted(ids))))}
    chosen = choose(preferred, in_flight)
    if not in_flight:
        assert chosen is None
        return
    assert chosen in in_flight
    limit = max(MIN_LIMIT, LOAD_FACTOR * (sum(in_flight.values()) + 1) / len(in_flight) + 1)
    if len(in_flight) > 1:
        assert in_flight[chosen] < limit
        assert all(in_flight[item] >= MIN_LIMIT for item in preferred[: preferred.index(chosen)] if item in in_flight)


def test_models_spread_over_orchestrators() -> None:
    first = [order(f"model-{index}", ("a", "b", "c"))[0] for index in range(300)]
    assert all(60 < first.count(item) < 140 for item in "abc")


# --- models


def revision(digit: str, version: str = "1") -> RevisionSpec:
    spec = (TensorSpec("x", DataType.FP32, (ROWS,)),)
    return RevisionSpec("m", digit * 64, version, "", "python", Signature(spec, spec), Batching(), 1, 60.0)


def group(spec: RevisionSpec, number: int = 0) -> Registration:
    return Registration("group", f"g{number}{spec.revision[:3]}", "e", {"model": spec.model, "revision": spec.revision})


def built(*groups: Registration, reports: tuple[GroupReport, ...] = (), replicas: int = 1, specs: tuple[RevisionSpec, ...] = ()) -> Model:
    published = {(spec.model, spec.revision): published_revision(spec) for spec in (revision("a"), *specs)}
    return build_models([Desired("m", "a" * 64, replicas)], published, groups, reports)["m"]


def test_ready_is_a_live_group_of_the_wanted_revision() -> None:
    serving = built(group(revision("a")), group(revision("a"), 1)).serving
    assert (serving.state, serving.reason, serving.num_ready_replicas) == (ModelState.READY, "", 2)


@pytest.mark.parametrize(
    ("reports", "replicas", "state", "reason"),
    [
        ((), 1, ModelState.LOADING, "no node has begun"),
        ((GroupReport("m", "a" * 64, "loading", ""),), 1, ModelState.LOADING, "loading"),
        ((GroupReport("m", "a" * 64, "backing_off", "out of memory"),), 1, ModelState.UNAVAILABLE, "out of memory"),
        ((GroupReport("m", "b" * 64, "backing_off", "other"),), 1, ModelState.LOADING, "no node has begun"),
        ((), 0, ModelState.UNAVAILABLE, "no replica of it is wanted"),
        (
            (GroupReport("m", "a" * 64, "loading", "epoch 1: no memory", "rank 1 on n: weights"),), 1, ModelState.LOADING,
            "its group is loading (rank 1 on n: weights); before that, epoch 1: no memory",
        ),
    ],
)
def test_without_a_group_the_nodes_say_why(reports: tuple[GroupReport, ...], replicas: int, state: ModelState, reason: str) -> None:
    serving = built(group(revision("b")), reports=reports, replicas=replicas).serving
    assert serving.state is state
    assert reason in serving.reason


SERVES = GroupReport("m", "a" * 64, "ready", "")


@pytest.mark.parametrize(
    ("reports", "reason"),
    [
        ((SERVES, GroupReport("m", "a" * 64, "backing_off", "no memory")), "a replica fails: no memory"),
        ((SERVES, GroupReport("m", "a" * 64, "loading", "")), "a replica is missing: its group is loading"),
        ((SERVES,), ""),
    ],
)
def test_a_model_that_serves_with_too_few_replicas_says_why(reports: tuple[GroupReport, ...], reason: str) -> None:
    serving = built(group(revision("a")), reports=reports, replicas=2).serving
    assert (serving.state, serving.reason) == (ModelState.READY, reason)
    assert built(group(revision("a")), reports=reports, replicas=1).serving.reason == ""


def test_a_model_without_its_document_is_not_served() -> None:
    assert build_models([Desired("m", "c" * 64, 1)], {}, [], []) == {}


def test_revisions_are_found_by_prefix_and_versions_by_label() -> None:
    old = revision("b", version="0.9")
    model = built(group(revision("a")), group(old), specs=(old, revision("c")))
    assert model.find("") is model.serving
    assert model.find("b" * 8).spec == old
    assert model.find("b" * 64).spec == old
    assert model.find("0.9", is_version=True).spec == old
    for unknown in ("b" * 7, "0.9", "c" * 64):
        with pytest.raises(NotFound, match=r"bbbbbbbbbbbb \(version 0.9\)"):
            model.find(unknown)
    twin = RevisionSpec(**{**{name: getattr(old, name) for name in old.__slots__}, "revision": "b" * 63 + "0"})
    with pytest.raises(InvalidRequest, match="several"):
        built(group(old), group(twin), specs=(old, twin)).find("b" * 8)

"""Operators on a traced step's span, as torch's own profiler saw them."""

from __future__ import annotations

import time

import pytest
import torch

from tensorway.telemetry.trace_context import new_trace
from tensorway.telemetry.tracing import Span, Tracer
from tensorway_worker.rank.step_detail import StepDetail
from tensorway_worker.rank.step_trace import StepTracing


class Kept:
    """An export that keeps its spans."""

    num_exported = num_dropped = 0

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def offer(self, span: Span) -> None:
        self.spans.append(span)


def work() -> None:
    left = torch.ones(64, 64)
    for _ in range(3):
        left = torch.mm(left, left).relu()


@pytest.fixture(scope="module")
def detail() -> StepDetail:
    return StepDetail(2)


def test_a_leaders_step_names_what_took_longest(detail: StepDetail) -> None:
    kept = Kept()
    tracing = StepTracing(Tracer(kept), 0, {}, detail)  # type: ignore[arg-type]
    for _ in range(2):
        span = tracing.open(new_trace().to_wire())
        assert span is not None
        began_s = time.monotonic()
        work()
        tracing.close(span, began_s, time.monotonic(), began_s)
    for span in kept.spans:
        assert len(span.events) == 2
        assert all(event.name.startswith("aten::") for event in span.events)
        assert span.events[0].attributes["self_cpu_us"] >= span.events[1].attributes["self_cpu_us"]
        assert span.attributes["tensorway.num_operators"] >= 6
        # What is done with the recording comes after the step.
        assert span.ended_s <= span.events[0].at_s


def test_in_a_linked_group_each_rank_says_its_own(detail: StepDetail) -> None:
    kept = Kept()
    tracing = StepTracing(Tracer(kept), 1, {}, detail, is_alone=False)  # type: ignore[arg-type]
    wire = new_trace().to_wire()
    span = tracing.open(wire)
    assert span is not None
    tracing.part(work, wire)()
    tracing.close(span, 0.0, 1.0, 0.0)
    part, step = kept.spans
    assert (part.name, len(part.events), step.name, step.events) == ("rank 1", 2, "step", [])


def test_another_profile_goes_first(detail: StepDetail) -> None:
    """A profile that somebody takes of the group is not disturbed, and the step's span is left without operators."""
    kept = Kept()
    tracing = StepTracing(Tracer(kept), 0, {}, detail)  # type: ignore[arg-type]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as other:
        tracing.part(work, new_trace().to_wire())()
    assert kept.spans[0].events == []
    assert any(item.key == "aten::mm" for item in other.key_averages())


def test_an_unsampled_step_is_not_looked_into(detail: StepDetail) -> None:
    tracing = StepTracing(Tracer(Kept()), 0, {}, detail)  # type: ignore[arg-type]
    assert tracing.open("") is None
    assert tracing.part(work, "") is work


def test_a_step_that_raises_says_what_it_did_until_then(detail: StepDetail) -> None:
    kept = Kept()
    tracing = StepTracing(Tracer(kept), 0, {}, detail)  # type: ignore[arg-type]

    def fails() -> None:
        work()
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        tracing.part(fails, new_trace().to_wire())()
    (span,) = kept.spans
    assert span.error == "ValueError: boom"
    assert len(span.events) == 2

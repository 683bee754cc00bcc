"""Spans of requests that are retried, hedged, or never sent."""

from __future__ import annotations

from typing import Any

from tensorway.telemetry.trace_context import SpanContext, from_wire, new_trace
from tensorway.telemetry.tracing import NO_TRACER, Span, Tracer
from tensorway.v1 import link_pb2
from tensorway_orchestrator import wire
from tensorway_orchestrator.request_trace import RequestTrace, begun, resumed, traces_of, with_trace
from tensorway_orchestrator.streams import Generation, open_stream


class Kept:
    """Stands where spans are exported from, and keeps them."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def offer(self, span: Span) -> None:
        self.spans.append(span)


class Asked:
    """A queued request, as far as its spans need it."""

    is_open = True

    def __init__(self, trace: RequestTrace | None) -> None:
        self.trace = trace
        self.head = link_pb2.RequestHead(model="m", traceparent="" if trace is None else trace.parent.to_wire()).SerializeToString()


def traced(kept: Kept, arrived_s: float = 1.0) -> Any:
    trace = RequestTrace.of(new_trace().to_wire(), Tracer(kept), arrived_s)  # type: ignore[arg-type]
    assert trace is not None
    return Asked(trace)


def told(spans: list[Span]) -> list[tuple[str, float, float, str, list[str]]]:
    return [(span.name, span.began_s, span.ended_s, span.error, [event.name for event in span.events]) for span in spans]


def test_each_wait_and_each_attempt_is_a_span() -> None:
    kept = Kept()
    request = traced(kept)
    first = begun([request], "a", 1, 2.0)
    assert first is not None
    first.ended(3.0, "UNAVAILABLE: gone")
    second = begun([request], "b", 1, 4.0)
    assert second is not None
    request.is_open = False
    second.ended(5.0)
    assert told(kept.spans) == [
        ("queue", 1.0, 2.0, "", []),
        ("attempt", 2.0, 3.0, "UNAVAILABLE: gone", []), ("batch", 2.0, 3.0, "UNAVAILABLE: gone", []),
        ("queue", 3.0, 4.0, "", []),
        ("attempt", 4.0, 5.0, "", ["retry"]), ("batch", 4.0, 5.0, "", []),
    ]
    assert {span.parent_id for span in kept.spans if span.name != "batch"} == {request.trace.parent.span_id}


def test_a_hedge_runs_beside_the_first_attempt_and_waits_for_nobody() -> None:
    kept = Kept()
    request = traced(kept)
    first, second = begun([request], "a", 1, 2.0), begun([request], "b", 1, 3.0)
    assert first is not None
    assert second is not None
    request.is_open = False
    second.ended(4.0)
    first.ended(4.0, "CANCELLED: nobody waits for it any more")
    assert [(name, events) for name, _, _, _, events in told(kept.spans)] == [
        ("queue", []), ("attempt", ["hedge"]), ("batch", []), ("attempt", []), ("batch", []),
    ]


def test_one_request_of_a_batch_fails_alone() -> None:
    kept = Kept()
    good, bad, unsampled = traced(kept), traced(kept), Asked(None)
    batch = begun([unsampled, good, bad], "a", 3, 2.0)  # type: ignore[list-item]
    assert batch is not None
    batch.failed(bad, "INTERNAL: of its own")
    good.is_open = bad.is_open = False
    batch.ended(3.0)
    attempts = [span for span in kept.spans if span.name == "attempt"]
    assert [span.error for span in attempts] == ["", "INTERNAL: of its own"]
    (span,) = [span for span in kept.spans if span.name == "batch"]
    assert span.links == [attempt.context for attempt in attempts]
    assert span.parent_id == attempts[0].context.span_id
    # The leader learns of the batch by the first sampled request's head; the others are as they came.
    heads = [link_pb2.RequestHead.FromString(batch.head_of(request)) for request in (unsampled, good, bad)]  # type: ignore[arg-type]
    assert [head.traceparent for head in heads] == ["", span.context.to_wire(), bad.trace.parent.to_wire()]


def test_a_request_that_never_leaves_has_waited() -> None:
    kept = Kept()
    request = traced(kept)
    request.trace.closed(2.0, "RESOURCE_EXHAUSTED: full")
    request.trace.closed(3.0, "once is enough")
    assert told(kept.spans) == [("queue", 1.0, 2.0, "RESOURCE_EXHAUSTED: full", [])]


def test_what_is_not_sampled_has_no_spans() -> None:
    assert begun([Asked(None)], "a", 1, 2.0) is None  # type: ignore[list-item]
    assert RequestTrace.of("", Tracer(Kept()), 1.0) is None  # type: ignore[arg-type]
    assert RequestTrace.of("nonsense", Tracer(Kept()), 1.0) is None  # type: ignore[arg-type]
    assert RequestTrace.of(new_trace().to_wire(), NO_TRACER, 1.0) is None


def test_a_head_names_the_last_parent_that_was_written() -> None:
    head = link_pb2.RequestHead(request_id="r", traceparent=new_trace().to_wire()).SerializeToString()
    context = SpanContext(*new_trace()[:2], state="vendor=1")
    read = link_pb2.RequestHead.FromString(with_trace(head, context))
    assert read.request_id == "r"
    assert from_wire(read.traceparent) == context


def test_who_goes_on_with_a_stream_sees_what_follows_from_that() -> None:
    kept = Kept()
    tracer = Tracer(kept)  # type: ignore[arg-type]
    first, second = new_trace(), new_trace()
    generation = Generation("r", 0, 3, 7, b"", (), "stream", traces=traces_of(first.to_wire(), tracer, 3))
    running, waiting, finished = (stream := open_stream(generation, 0.0, 9.0)).choices
    running.attempt = Asked(None)  # type: ignore[assignment]
    finished.transcript.is_finished = True
    resumed(stream, "", tracer)
    resumed(stream, second.to_wire(), NO_TRACER)
    assert kept.spans == []
    resumed(stream, second.to_wire(), tracer)
    queue, span = kept.spans
    assert (queue.name, queue.parent_id, queue.error[:9]) == ("queue", first.span_id, "CANCELLED")
    assert (span.name, span.parent_id, span.links) == ("resume", second.span_id, [first])
    assert span.attributes == {"tensorway.next_sequence": 0, "tensorway.is_running": True}
    assert [choice.trace and choice.trace.parent for choice in (running, waiting, finished)] == [first, second, first]


def test_a_log_line_names_the_request_that_its_head_is_of() -> None:
    context = new_trace()
    head = link_pb2.RequestHead(request_id="r", model="m", revision="f" * 64)
    assert wire.log_fields(head.SerializeToString()) == {"request_id": "r", "model": "m"}
    head.traceparent = context.to_wire()
    assert wire.log_fields(head.SerializeToString()) == {"request_id": "r", "model": "m", "trace_id": context.trace_id}

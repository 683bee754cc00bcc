"""What a leader's log lines say of requests and batches."""

from __future__ import annotations

from tensorway.telemetry.trace_context import new_trace
from tensorway.telemetry.tracing import Span, Tracer
from tensorway_worker.rank.step_trace import StepTracing, batch_fields, log_fields


class Kept:
    """Stands where spans are exported from."""

    def offer(self, span: Span) -> None:
        """Not looked at."""


def test_a_line_about_a_batch_names_some_of_its_requests_and_its_trace() -> None:
    context = new_trace()
    ids = [f"r{number}" for number in range(100)]
    assert batch_fields(ids[:2], "") == {"request_ids": ["r0", "r1"]}
    assert batch_fields(iter(ids), context.to_wire()) == {"request_ids": ids[:8], "trace_id": context.trace_id}


def test_a_line_about_a_request_is_of_the_step_that_runs_or_of_the_trace_that_is_given() -> None:
    step, given = new_trace(), new_trace()
    assert log_fields("r") == {"request_id": "r"}
    assert log_fields("r", given.to_wire()) == {"request_id": "r", "trace_id": given.trace_id}
    tracing = StepTracing(Tracer(Kept()), 0, {})  # type: ignore[arg-type]
    span = tracing.open(step.to_wire())
    assert span is not None
    try:
        assert log_fields("r") == {"request_id": "r", "trace_id": step.trace_id}
    finally:
        tracing.close(span, 1.0, 2.0, 0.5)
    assert log_fields("r") == {"request_id": "r"}

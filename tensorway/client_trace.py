"""The caller's OpenTelemetry context, where there is one: a call joins the trace of the span in which it is made.

Nothing is imported: who has not loaded OpenTelemetry has no span.
"""

from __future__ import annotations

import sys
from typing import Any


def trace_headers() -> tuple[tuple[str, str], ...]:
    """`traceparent`, and `tracestate` where it says something, of the current span; empty outside of one."""
    otel: Any = sys.modules.get("opentelemetry.trace")
    if otel is None:
        return ()
    context = otel.get_current_span().get_span_context()
    if not context.is_valid:
        return ()
    traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
    state = context.trace_state.to_header()
    return (("traceparent", traceparent), ("tracestate", state)) if state else (("traceparent", traceparent),)

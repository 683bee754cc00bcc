"""The span of one request at the gateway: OpenTelemetry's conventions for the server's side of an RPC, and what is known of the request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tensorway.errors import Status, TensorwayError
from tensorway.telemetry.tracing import Span, Tracer
from tensorway.transport.port import Call
from tensorway_gateway.accounting import Accounting, Arrived, Unread
from tensorway_gateway.identity.access import Access
from tensorway_gateway.request_ids import id_trailer
from tensorway_gateway.requests import Answered

#: Statuses that are the server's failures, by the conventions; the others are the caller's, and no error of this span.
_SERVER_ERRORS: Final = frozenset(
    {Status.UNKNOWN, Status.DEADLINE_EXCEEDED, Status.UNIMPLEMENTED, Status.INTERNAL, Status.UNAVAILABLE, Status.DATA_LOSS}
)


def open_span(tracer: Tracer, call: Call, arrived_s: float) -> Span | None:
    """The request's span; None where it is not sampled."""
    return tracer.open(call.metadata, call.method.lstrip("/"), arrived_s)


@contextmanager
def recorded(tracer: Tracer, span: Span, arrival: Arrived) -> Iterator[None]:
    """Records the span when the block ends, however it does."""
    _name(span, arrival)
    status = "UNKNOWN"
    try:
        yield
        status = Status.OK.name
    except TensorwayError as error:
        status = _failed(span, error)
        raise
    except asyncio.CancelledError:
        status = Status.CANCELLED.name
        span.add_event("the client has gone")
        raise
    finally:
        _end(tracer, span, status)


def tell_unread(
    tracer: Tracer, accounting: Accounting, access: Access, call: Call, unread: Unread, error: TensorwayError
) -> None:
    """Counts and logs a request that ended before its path, records its span where it is sampled, and gives it the trailer by which its
    caller finds it."""
    span = open_span(tracer, call, unread.arrived_s)
    accounting.failed(unread, None, None, error, None if span is None else span.context, access.caller(call))
    call.set_trailers((id_trailer(unread.request_id),))
    if span is not None:
        span.attributes |= access.span_attributes(call)
        _name(span, unread)
        _end(tracer, span, _failed(span, error))


def describe(span: Span, answered: Answered) -> None:
    """What became known of a request with its answer."""
    answer, timing = answered.answer, answered.answer.timing
    span.attributes |= {
        "tensorway.revision": answer.revision, "tensorway.group": timing.group, "tensorway.num_attempts": timing.num_attempts,
        "tensorway.batch_rows": timing.batch_rows, "tensorway.batch_requests": timing.batch_requests,
    }
    if answer.model:
        span.attributes["tensorway.fallback"] = answer.model


def _name(span: Span, arrival: Arrived) -> None:
    span.attributes |= {
        "rpc.system.name": "grpc", "rpc.method": span.name, "tensorway.request_id": arrival.request_id, "tensorway.model": arrival.model,
        "tensorway.request_bytes": arrival.num_bytes,
    }


def _failed(span: Span, error: TensorwayError) -> str:
    """The status' name."""
    if error.status in _SERVER_ERRORS:
        span.error = error.message
    return error.status.name


def _end(tracer: Tracer, span: Span, status: str) -> None:
    span.attributes["rpc.response.status_code"] = status
    if status != Status.OK.name:
        span.attributes["error.type"] = status
    tracer.record(span)

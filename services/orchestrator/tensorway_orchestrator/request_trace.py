"""The spans of sampled requests here, made from what lanes know anyway. A request that is not sampled has none of this.

    gateway's span
      ├ resume       of a call that goes on with a stream: links to the call that began it
      ├ queue        each time the request waits: for its first group, and again after a lost attempt
      └ attempt      each sending of it; retries and hedges are further ones, and say so in an event. Links to its batch
          └ batch    one for each batch, in the trace of the first sampled request in it. Links to every sampled request's attempt
              └ step …   the group's, see `tensorway_worker`
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from tensorway.errors import TensorwayError
from tensorway.telemetry.trace_context import SpanContext, from_wire
from tensorway.telemetry.tracing import CLIENT, Span, Tracer, child_of
from tensorway.tensor_message import varint

if TYPE_CHECKING:
    from tensorway_orchestrator.requests import Request
    from tensorway_orchestrator.streams import Stream

#: Tag of `RequestHead.traceparent`, field 9 with a length. Of a field that comes twice, the last one counts.
_TRACEPARENT_TAG: Final = b"\x4a"
_NOT_WAITING: Final = -1.0


@dataclass(slots=True, eq=False)
class RequestTrace:
    """One sampled request, or one choice of a sampled generation. Instants are on the monotonic clock."""

    tracer: Tracer
    #: The gateway's span.
    parent: SpanContext
    waits_since_s: float
    num_attempts: int = 0
    #: Groups that were sent it and have not answered.
    groups: list[str] = field(default_factory=list)
    #: Groups that did not answer it, since the last attempt.
    lost_on: str = ""

    @classmethod
    def of(cls, traceparent: str, tracer: Tracer, arrived_s: float) -> Self | None:
        """None for a request that is not sampled, or where nothing is traced here."""
        if not traceparent or not tracer.is_on:
            return None
        parent = from_wire(traceparent)
        return None if parent is None else cls(tracer, parent, arrived_s)

    def sent(self, group: str, now_s: float) -> Span:
        """It leaves for a group: the attempt's span."""
        if self.waits_since_s != _NOT_WAITING:
            self.tracer.record(child_of(self.parent, "queue", self.waits_since_s), now_s)
            self.waits_since_s = _NOT_WAITING
        self.num_attempts += 1
        span = child_of(self.parent, "attempt", now_s, CLIENT, {"tensorway.attempt": self.num_attempts, "tensorway.group": group})
        if self.lost_on:
            span.add_event("retry", now_s, {"tensorway.lost_on": self.lost_on})
        if self.groups:
            span.add_event("hedge", now_s, {"tensorway.late_on": ", ".join(self.groups)})
        self.groups.append(group)
        return span

    def ended(self, span: Span, now_s: float, error: str, *, waits: bool) -> None:
        """An attempt is over; `waits`: the request goes on and waits for another."""
        group = str(span.attributes["tensorway.group"])
        if group in self.groups:
            self.groups.remove(group)
        span.error = span.error or error
        if span.error:
            self.lost_on = group
        if waits and not self.groups and self.waits_since_s == _NOT_WAITING:
            self.waits_since_s = now_s
        self.tracer.record(span, now_s)

    def closed(self, now_s: float, error: str) -> None:
        """The request has ended. `error` says why it is not answered; it waited until now, or no group is to blame."""
        if self.waits_since_s != _NOT_WAITING:
            span = child_of(self.parent, "queue", self.waits_since_s)
            span.error = error
            self.waits_since_s = _NOT_WAITING
            self.tracer.record(span, now_s)

    def stopped(self) -> None:
        """Nobody waits for it any more."""
        self.closed(time.monotonic(), "CANCELLED: the stream ended before")


class BatchTrace:
    """One batch on its way to a group and back."""

    __slots__ = ("_attempts", "_tracer", "span")

    def __init__(
        self, attempts: list[tuple[Request, RequestTrace, Span]], tracer: Tracer, group: str, rows: int, num_requests: int
    ) -> None:
        first = attempts[0][2]
        self._tracer = tracer
        self._attempts = attempts
        self.span = child_of(
            first.context, "batch", first.began_s, CLIENT,
            {"tensorway.group": group, "tensorway.batch_rows": rows, "tensorway.batch_requests": num_requests},
        )
        for _, _, attempt in attempts:
            attempt.links.append(self.span.context)
            self.span.links.append(attempt.context)

    def head_of(self, request: Request) -> bytes:
        """The request's head as the group gets it: its step belongs under the batch, which the first sampled request names."""
        return with_trace(request.head, self.span.context) if request is self._attempts[0][0] else request.head

    def failed(self, request: Request, error: str) -> None:
        """The group answered this one with an error."""
        for one, _, attempt in self._attempts:
            if one is request:
                attempt.error = error

    def ended(self, now_s: float, error: str = "") -> None:
        """The group has answered, or was lost; `error` says how."""
        for request, trace, attempt in self._attempts:
            trace.ended(attempt, now_s, error, waits=request.is_open)
        self.span.error = error
        self._tracer.record(self.span, now_s)


def begun(requests: Sequence[Request], group: str, rows: int, now_s: float) -> BatchTrace | None:
    """The spans of a batch that is sent now; None where no request in it is sampled."""
    attempts = [(request, trace, trace.sent(group, now_s)) for request in requests if (trace := request.trace) is not None]
    return BatchTrace(attempts, attempts[0][1].tracer, group, rows, len(requests)) if attempts else None


def resumed(stream: Stream, traceparent: str, tracer: Tracer) -> None:
    """A new reader goes on with a stream. What a group works on stays in the trace of the call that began it; what waits, or is to be sent
    anew, belongs to the new one. Nothing where the new call is not sampled."""
    now_s = time.monotonic()
    parent = from_wire(traceparent) if traceparent and tracer.is_on else None
    if parent is None:
        return
    span = child_of(parent, "resume", now_s)
    span.attributes |= {"tensorway.next_sequence": stream.log.next_sequence, "tensorway.is_running": stream.is_running}
    span.links += dict.fromkeys(choice.trace.parent for choice in stream.choices if choice.trace is not None)
    for choice in stream.choices:
        if choice.attempt is None and not choice.transcript.is_finished:
            if choice.trace is not None:
                choice.trace.closed(now_s, "CANCELLED: another call has taken the stream over")
            choice.trace = RequestTrace(tracer, parent, now_s)
    tracer.record(span)


def traces_of(traceparent: str, tracer: Tracer, num_choices: int) -> tuple[RequestTrace, ...]:
    """The traces of a generation's choices; none where it is not sampled."""
    now_s = time.monotonic()
    made = (RequestTrace.of(traceparent, tracer, now_s) for _ in range(num_choices))
    return tuple(trace for trace in made if trace is not None)


def with_trace(head: bytes, context: SpanContext) -> bytes:
    """A serialised RequestHead that names another span as its parent."""
    text = context.to_wire().encode()
    return b"".join((head, _TRACEPARENT_TAG, varint(len(text)), text))


def log_fields(request_id: str, trace: RequestTrace | None) -> dict[str, str]:
    """What a log line says of a request."""
    return {"request_id": request_id} if trace is None else {"request_id": request_id, "trace_id": trace.parent.trace_id}


def message_of(error: TensorwayError | None) -> str:
    """What a span says of an error; empty for none."""
    return "" if error is None else f"{error.status.name}: {error.message}"

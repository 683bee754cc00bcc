"""The path of one inference request through the gateway, the same for every dialect."""

from __future__ import annotations

import time
from typing import Final

from tensorway.access.permissions import Action
from tensorway.errors import InvalidRequest, TensorwayError
from tensorway.telemetry.trace_context import SpanContext
from tensorway.telemetry.tracing import NO_TRACER, Tracer
from tensorway.transport.port import Call
from tensorway_gateway.accounting import Accounting, Unread
from tensorway_gateway.admission import Admission
from tensorway_gateway.catalog import Catalog
from tensorway_gateway.identity.access import OPEN, Access
from tensorway_gateway.identity.caller import Caller
from tensorway_gateway.models import Model, Revision
from tensorway_gateway.request_ids import RequestIds, id_trailer
from tensorway_gateway.request_span import describe, open_span, recorded, tell_unread
from tensorway_gateway.requests import MAX_PRIORITY, MIN_PRIORITY, Answer, Answered, Arrival
from tensorway_gateway.statistics import Statistics
from tensorway_gateway.upstream import Upstream
from tensorway_gateway.wire import NUM_TOKENS, read_reply, write_request_head

TIMING_TRAILER: Final = "tensorway-timing"
KEY_METADATA: Final = "idempotency-key"
MAX_KEY_CHARS: Final = 256


class RequestPath:
    """Look up, check, admit, send, read the answer, count."""

    def __init__(
        self, catalog: Catalog, admission: Admission, upstream: Upstream, statistics: Statistics, tracer: Tracer = NO_TRACER,
        access: Access = OPEN,
    ) -> None:
        self._catalog = catalog
        self._admission = admission
        self._upstream = upstream
        self._accounting = Accounting(statistics)
        self._ids = RequestIds()
        self._tracer = tracer
        self._access = access

    def request_id(self, given: str) -> str:
        """The caller's id, or a new one. Raises InvalidRequest for one that is too long to carry along."""
        return self._ids.given_or_next(given)

    def unread(self, call: Call, num_bytes: int, arrived_s: float, error: TensorwayError) -> None:
        """Tells of a request that ends before its path: its message of so many bytes could not be read. The caller raises `error`."""
        tell_unread(self._tracer, self._accounting, self._access, call, Unread(self._ids.next(), num_bytes, arrived_s), error)

    async def run(self, arrival: Arrival, call: Call) -> Answered:
        """Runs one request; raises the TensorwayError that says who must act. Sets the trailers either way."""
        span = open_span(self._tracer, call, arrival.arrived_s) if self._tracer.is_on else None
        if span is None:
            return await self._run(arrival, call, None)
        span.attributes |= self._access.span_attributes(call)
        with recorded(self._tracer, span, arrival):
            answered = await self._run(arrival, call, span.context)
            describe(span, answered)
            return answered

    async def _run(self, arrival: Arrival, call: Call, trace: SpanContext | None) -> Answered:
        model: Model | None = None
        revision: Revision | None = None
        caller: Caller | None = None
        try:
            caller = self._access.caller(call)
            caller.permit(Action.EXPLAIN if arrival.explain else Action.INFER, arrival.model)
            caller.enter()
            try:
                model = self._catalog.find(arrival.model, caller.sees)
                revision = model.find(arrival.revision, is_version=arrival.is_version)
                if not MIN_PRIORITY <= arrival.priority <= MAX_PRIORITY:
                    raise InvalidRequest(f"priority: {arrival.priority} is outside {MIN_PRIORITY} to {MAX_PRIORITY}", field="priority")
                rows = revision.check.rows(arrival.inputs, arrival.output_names, arrival.field_path)
                answer, sent_s, answered_s = await self._send(arrival, revision, rows, call, caller, trace)
                if caller.meter.counts_tokens and revision.spec.generation is not None:
                    caller.meter.spend_tokens(_num_tokens(answer), time.monotonic())
            finally:
                caller.leave(time.monotonic() - arrival.arrived_s)
        except TensorwayError as error:
            self._access.count(error, Action.EXPLAIN if arrival.explain else Action.INFER)
            self._accounting.failed(arrival, model, revision, error, trace, caller)
            call.set_trailers((id_trailer(arrival.request_id),))
            raise
        took_s = self._accounting.answered(arrival, revision, rows, answer.timing, trace, caller)
        call.set_trailers((id_trailer(arrival.request_id), (TIMING_TRAILER, _timing_line(answer, answered_s - sent_s, took_s))))
        if answer.model:
            return Answered(answer, arrival.request_id, answer.model, self._catalog.version(answer.model, answer.revision))
        return Answered(answer, arrival.request_id, revision.spec.model, revision.spec.version)

    async def _send(
        self, arrival: Arrival, revision: Revision, rows: int, call: Call, caller: Caller, trace: SpanContext | None
    ) -> tuple[Answer, float, float]:
        """The answer, and when the request left and when its answer came, seconds on `time.monotonic()`."""
        admission, spec = self._admission, revision.spec
        admission.admit(arrival.num_bytes)
        try:
            sent_s = time.monotonic()
            deadline = admission.deadline(call.deadline, arrival.timeout_s, spec.default_timeout_s, sent_s)
            key = caller.scoped(idempotency_key(arrival.idempotency_key, call))
            head = write_request_head(arrival, spec.revision, rows, key, trace)
            payload = tuple([tensor.data for tensor in arrival.inputs])
            reply = await self._upstream.send(spec.model, head, payload, deadline, is_keyed=bool(key))
            answered_s = time.monotonic()
            return read_reply(reply.head, reply.payload), sent_s, answered_s
        finally:
            admission.release(arrival.num_bytes, time.monotonic() - arrival.arrived_s)


def _timing_line(answer: Answer, upstream_s: float, took_s: float) -> str:
    """Where the time went. `orchestrator` is what the way there and back took beyond queue and group; `gateway` all that was spent here."""
    timing = answer.timing
    upstream_us = int(upstream_s * 1e6)
    return (
        f"queue={timing.queue_us}us;batch={timing.batch_rows}/{timing.batch_requests};group={timing.group};attempts={timing.num_attempts};"
        f"wait={timing.wait_us}us;step={timing.step_us}us;gateway={int(took_s * 1e6) - upstream_us}us;"
        f"orchestrator={max(0, upstream_us - timing.queue_us - timing.group_us)}us"
        + (f";hedges={timing.num_hedges}" if timing.num_hedges else "") + (f";fallback={answer.model}" if answer.model else "")
    )


def _num_tokens(answer: Answer) -> int:
    """Tokens that were generated for an answer in one piece, as its orchestrator says."""
    said = answer.parameters.get(NUM_TOKENS, 0)
    return said if isinstance(said, int) else 0


def idempotency_key(given: str, call: Call) -> str:
    """The caller's key: the native dialect's field, or the metadata key of any dialect.

    Raises InvalidRequest for one that is no text, or too long.
    """
    key = given or call.metadata.get(KEY_METADATA, "")
    if isinstance(key, bytes) or len(key) > MAX_KEY_CHARS:
        raise InvalidRequest(f"{KEY_METADATA}: must be text of at most {MAX_KEY_CHARS} characters", field=KEY_METADATA)
    return key

"""The path of one generation through the gateway, the same for every dialect."""

from __future__ import annotations

import asyncio
import logging
import time

from tensorway.access.permissions import Action
from tensorway.deadline import DEFAULT_TIMEOUT_S, Deadline
from tensorway.errors import DeadlineExceeded, FailedPrecondition, NotFound, TensorwayError, Unavailable
from tensorway.telemetry.trace_context import SpanContext
from tensorway.telemetry.tracing import NO_TRACER, Tracer
from tensorway.transport.port import Call
from tensorway_gateway.accounting import Accounting, Unread
from tensorway_gateway.admission import Admission
from tensorway_gateway.catalog import Catalog
from tensorway_gateway.generation_wire import num_tokens, sequence_after, write_continued_head, write_generation_head, write_resume_head
from tensorway_gateway.identity.access import OPEN, Access
from tensorway_gateway.identity.caller import Caller
from tensorway_gateway.models import Model, Revision
from tensorway_gateway.relay import Reader, RelayLog, relay
from tensorway_gateway.request_ids import RequestIds, id_trailer
from tensorway_gateway.request_span import open_span, recorded, tell_unread
from tensorway_gateway.requests import GenerationArrival, StreamPosition
from tensorway_gateway.statistics import Statistics
from tensorway_gateway.upstream import Upstream

_LOG = logging.getLogger(__name__)


class GenerationPath:
    """Look up, admit, send, relay, go on elsewhere where an orchestrator is lost, count."""

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

    def find(self, name: str, call: Call) -> Model:
        """The model of that name, which may not generate, for who calls. Raises NotFound, PermissionDenied or Unauthenticated."""
        caller = self._access.caller(call)
        caller.permit(Action.INFER, name)
        return self._catalog.find(name, caller.sees)

    def unread(self, call: Call, num_bytes: int, arrived_s: float, error: TensorwayError) -> None:
        """See `RequestPath.unread`."""
        tell_unread(self._tracer, self._accounting, self._access, call, Unread(self._ids.next(), num_bytes, arrived_s), error)

    async def run(self, arrival: GenerationArrival, call: Call, reader: Reader) -> None:
        """Runs one generation to the end of its stream, whose messages go to `reader`; raises the TensorwayError that says who must act.
        Sets the trailers either way."""
        log = RelayLog(keeps_all=arrival.resume is None)
        span = open_span(self._tracer, call, arrival.arrived_s) if self._tracer.is_on else None
        if span is None:
            await self._run(arrival, call, reader, log, None)
            return
        span.attributes |= self._access.span_attributes(call)
        with recorded(self._tracer, span, arrival):
            try:
                await self._run(arrival, call, reader, log, span.context)
            finally:
                span.attributes["tensorway.num_messages"] = log.num_messages
                if log.first_delta_s is not None:
                    span.add_event("first token sent", log.first_delta_s)

    async def _run(self, arrival: GenerationArrival, call: Call, reader: Reader, log: RelayLog, trace: SpanContext | None) -> None:
        model: Model | None = None
        revision: Revision | None = None
        caller: Caller | None = None
        call.set_trailers((id_trailer(arrival.request_id),))
        try:
            if arrival.resume is None:
                model = self.find(arrival.model, call)
                revision = model.find(arrival.revision, is_version=arrival.is_version)
                if revision.spec.generation is None:
                    raise FailedPrecondition(f"model {model.name!r} does not generate; use Infer", field="model")
            caller = self._access.caller(call)
            caller.enter()
            try:
                await self._admitted(arrival, revision, call, caller, log, reader, trace)
            finally:
                caller.leave(time.monotonic() - arrival.arrived_s)
                if caller.meter.counts_tokens:
                    caller.meter.spend_tokens(num_tokens(log.messages, log.num_messages), time.monotonic())
        except TensorwayError as error:
            self._access.count(error, Action.INFER)
            self._accounting.failed(arrival, model, revision, error, trace, caller)
            raise
        finally:
            first_delta_s = None if log.first_delta_s is None else log.first_delta_s - arrival.arrived_s
            self._accounting.relayed(revision, log.num_messages, first_delta_s)
        self._accounting.streamed(arrival, revision, trace, caller)

    async def _admitted(
        self, arrival: GenerationArrival, revision: Revision | None, call: Call, caller: Caller, log: RelayLog, reader: Reader,
        trace: SpanContext | None,
    ) -> None:
        admission = self._admission
        admission.admit(arrival.num_bytes)
        try:
            default_s = DEFAULT_TIMEOUT_S if revision is None else revision.spec.default_timeout_s
            deadline = admission.deadline(call.deadline, arrival.timeout_s, default_s, time.monotonic())
            async with asyncio.timeout(deadline.remaining_s()):
                if revision is None:
                    assert arrival.resume is not None
                    if not caller.owns_stream(arrival.resume.stream_id):
                        raise _unknown_stream(arrival.resume)
                    await self._resume(arrival.request_id, arrival.resume, deadline, log, reader, trace)
                else:
                    await self._generate(arrival, revision, deadline, caller, log, reader, trace)
        except TimeoutError:
            raise _late(log) from None
        finally:
            admission.release(arrival.num_bytes, time.monotonic() - arrival.arrived_s)

    async def _generate(
        self, arrival: GenerationArrival, revision: Revision, deadline: Deadline, caller: Caller, log: RelayLog, reader: Reader,
        trace: SpanContext | None,
    ) -> None:
        """A new stream. One whose orchestrator is lost goes on at another with what the client has; the same one may be asked again once
        it has done something, so that a stream outlives every orchestrator's restart."""
        spec = revision.spec
        head: bytes | None = write_generation_head(arrival, spec.revision, trace, caller.new_stream_id())
        tried: set[str] = set()
        lost: Unavailable | None = None
        while head is not None:
            orchestrator = await self._upstream.pick(spec.model, tried, lost, deadline)
            tried.add(orchestrator.id)
            num_before = log.num_messages
            try:
                await relay(orchestrator, head, deadline, log, reader)
                return
            except Unavailable as error:
                lost = error
                fields = {"request_id": arrival.request_id, "model": arrival.model}
                _LOG.debug(
                    "orchestrator %s lost a stream after %d messages: %s", orchestrator.id, log.num_messages, error,
                    extra={"fields": fields if trace is None else {**fields, "trace_id": trace.trace_id}},
                )
            if log.num_messages > num_before:
                tried.clear()
                head = write_continued_head(arrival, spec.revision, log.messages, trace)

    async def _resume(
        self, request_id: str, position: StreamPosition, deadline: Deadline, log: RelayLog, reader: Reader, trace: SpanContext | None
    ) -> None:
        """A stream that some orchestrator keeps: each is asked in turn. Raises NotFound where none knows it, and Unavailable where one that
        might have known it could not be asked."""
        next_sequence = position.next_sequence
        while True:
            head = write_resume_head(request_id, position.stream_id, next_sequence, trace)
            num_before = log.num_messages
            lost: Unavailable | None = None
            for orchestrator in await self._upstream.all_connected(deadline):
                try:
                    await relay(orchestrator, head, deadline, log, reader)
                    return
                except NotFound:
                    continue
                except Unavailable as error:
                    lost = error
                    if log.num_messages > num_before:
                        break
            if log.num_messages > num_before:
                next_sequence = sequence_after(log.messages[-1])
            elif lost is not None:
                raise lost
            else:
                raise _unknown_stream(position)


def _unknown_stream(position: StreamPosition) -> NotFound:
    """The same for one that is another caller's: nobody learns which streams there are."""
    return NotFound(f"stream {position.stream_id[:64]!r} is not known here, or not any more; begin anew", field="resume.stream_id")


def _late(log: RelayLog) -> DeadlineExceeded:
    if log.is_writing:
        return DeadlineExceeded(f"the deadline passed while the client had not taken message {log.num_messages}", hop="client")
    return DeadlineExceeded(
        f"the deadline passed while the answer was being generated; {log.num_messages} messages were sent", hop="orchestrator"
    )

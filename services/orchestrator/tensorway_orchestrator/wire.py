"""Between the wire's heads and the orchestrator's dataclasses; the only module here, besides the servicer, that sees protobuf."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final

from google.protobuf.message import DecodeError

from tensorway.errors import InvalidRequest, TensorwayError
from tensorway.telemetry.trace_context import from_wire
from tensorway.telemetry.tracing import NO_TRACER, Tracer
from tensorway.tensors import Buffer
from tensorway.transport.error_detail import from_detail
from tensorway.transport.port import Exchange, Payload
from tensorway.v1 import link_pb2
from tensorway_orchestrator.batching import ShapeRule
from tensorway_orchestrator.group_record import SentBatch
from tensorway_orchestrator.request_trace import BatchTrace, RequestTrace
from tensorway_orchestrator.requests import Request

_EXPLANATIONS: Final = count()


@dataclass(frozen=True, slots=True)
class Envelope:
    """What must be known of a request before its queue is found."""

    model: str
    revision: str
    head: link_pb2.RequestHead

    @property
    def is_generation(self) -> bool:
        return self.head.HasField("generate")

    @property
    def is_explanation(self) -> bool:
        return self.head.HasField("explain")

    @property
    def resume(self) -> tuple[str, int] | None:
        """Of a generation that was begun before: the stream's id, and the number of the next message; else None."""
        if not self.is_generation or self.head.generate.WhichOneof("prompt") != "resume":
            return None
        wanted = self.head.generate.resume
        return wanted.stream_id, wanted.next_sequence


def read_envelope(head: bytes) -> Envelope:
    """Raises InvalidRequest where `head` is no RequestHead."""
    try:
        message = link_pb2.RequestHead.FromString(head)
    except DecodeError as error:
        raise InvalidRequest("the link's request head is not a RequestHead", field="head") from error
    return Envelope(message.model, message.revision, message)


def read_request(envelope: Envelope, exchange: Exchange, rule: ShapeRule, now_s: float, tracer: Tracer = NO_TRACER) -> Request:
    """The request as the queue holds it."""
    message = envelope.head
    key: tuple[int, ...] = ()
    is_explanation = envelope.is_explanation
    if is_explanation:
        # A key like no other: nothing is joined with it.
        key = (-1, next(_EXPLANATIONS))
    elif rule.dimensions:
        key = rule.shape_key({tensor.name: tuple(tensor.shape) for tensor in message.inputs})
    return Request(
        request_id=message.request_id,
        rows=message.rows,
        num_bytes=sum(map(len, exchange.payload)),
        priority=message.priority,
        deadline_s=exchange.deadline.at_s,
        shape_key=key,
        head=exchange.head,
        payload=exchange.payload,
        arrived_s=now_s,
        origin=exchange,
        is_explanation=is_explanation,
        trace=RequestTrace.of(message.traceparent, tracer, now_s),
    )


def write_batch(
    batch_id: int, epoch: int, requests: Sequence[Request], now_s: float, trace: BatchTrace | None = None
) -> tuple[bytes, Payload]:
    """Head and payload of one batch: the requests' own heads and segments, none of them copied."""
    head = link_pb2.BatchHead(
        batch_id=batch_id,
        epoch=epoch,
        requests=[request.head for request in requests] if trace is None else [trace.head_of(request) for request in requests],
        remaining_us=[max(1, int((request.deadline_s - now_s) * 1e6)) for request in requests],
    ).SerializeToString()
    return head, tuple(segment for request in requests for segment in request.payload)


@dataclass(frozen=True, slots=True)
class BatchReply:
    """What a leader answered. `results` are in batch order: a ReplyHead's response bytes with their payload, or an error."""

    results: tuple[tuple[bytes, Payload] | TensorwayError, ...]
    wait_us: int
    step_us: int
    prepare_us: int


def read_batch_reply(head: bytes, payload: Payload, num_requests: int) -> BatchReply:
    """Raises InvalidRequest where the reply does not fit the batch."""
    try:
        message = link_pb2.BatchReplyHead.FromString(head)
    except DecodeError as error:
        raise InvalidRequest("the leader's reply head is not a BatchReplyHead", field="head") from error
    if len(message.results) != num_requests:
        raise InvalidRequest(f"the leader answered {len(message.results)} of {num_requests} requests", field="results")
    cut = _Cutter(payload)
    results: list[tuple[bytes, Payload] | TensorwayError] = []
    for result in message.results:
        if result.HasField("error"):
            results.append(from_detail(result.error))
        else:
            results.append((result.response, cut.take(result.body_bytes)))
    return BatchReply(tuple(results), message.wait_us, message.step_us, message.prepare_us)


def write_reply(response: bytes, revision: str, timing: link_pb2.Timing) -> bytes:
    """Head of the answer to a gateway; `response` is the leader's own, unread."""
    return link_pb2.ReplyHead(response=response, revision=revision, timing=timing).SerializeToString()


def fingerprint(head: bytes, payload: Payload) -> str:
    """32 hex digits of what a request asks, whoever asks it and when: tensors, outputs, parameters and options."""
    message = link_pb2.RequestHead.FromString(head)
    for name in ("request_id", "revision", "priority", "traceparent", "idempotency_key"):
        message.ClearField(name)
    digest = hashlib.blake2b(message.SerializeToString(deterministic=True), digest_size=16)
    for segment in payload:
        digest.update(segment)
    return digest.hexdigest()


def log_fields(head: bytes) -> dict[str, str]:
    """What a log line says of the request with this head."""
    message = link_pb2.RequestHead.FromString(head)
    fields = {"request_id": message.request_id, "model": message.model}
    context = from_wire(message.traceparent) if message.traceparent else None
    return fields if context is None else {**fields, "trace_id": context.trace_id}


def readdressed(head: bytes, model: str, revision: str) -> Envelope:
    """The same request, for another model or revision."""
    message = link_pb2.RequestHead.FromString(head)
    message.model, message.revision = model, revision
    if message.HasField("generate"):
        message.generate.model, message.generate.revision = model, revision
    return Envelope(model, revision, message)


def name_model(reply_head: bytes, model: str) -> bytes:
    """A ReplyHead that says which model answered."""
    reply = link_pb2.ReplyHead.FromString(reply_head)
    reply.model = model
    return reply.SerializeToString()


def timing_of(reply: BatchReply, request: Request, batch: SentBatch, num_requests: int, is_first: bool, group: str) -> link_pb2.Timing:
    """Where the time of one request went."""
    now_s = time.monotonic()
    return link_pb2.Timing(
        queue_us=int((batch.sent_s - request.arrived_s) * 1e6),
        group_us=int((now_s - batch.sent_s) * 1e6),
        wait_us=reply.wait_us,
        step_us=reply.step_us,
        prepare_us=reply.prepare_us,
        batch_rows=batch.rows,
        batch_requests=num_requests,
        is_first_in_batch=is_first,
        num_attempts=request.num_attempts,
        num_hedges=request.num_hedges,
        group=group,
    )


class _Cutter:
    """Cuts consecutive pieces off a payload without copying."""

    def __init__(self, payload: Payload) -> None:
        self._segments = payload
        self._index = 0
        self._offset = 0

    def take(self, num_bytes: int) -> Payload:
        """The next `num_bytes` bytes. Raises InvalidRequest where fewer are left."""
        pieces: list[Buffer] = []
        while num_bytes:
            if self._index >= len(self._segments):
                raise InvalidRequest(f"the leader's reply lacks {num_bytes} bytes", field="body_bytes")
            segment = self._segments[self._index]
            available = len(segment) - self._offset
            if available <= num_bytes:
                pieces.append(memoryview(segment)[self._offset :] if self._offset else segment)
                self._index, self._offset = self._index + 1, 0
                num_bytes -= available
            else:
                pieces.append(memoryview(segment)[self._offset : self._offset + num_bytes])
                self._offset += num_bytes
                num_bytes = 0
        return tuple(pieces)

"""Between the link's heads of a generation and the gateway's dataclasses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from google.protobuf.message import DecodeError

from tensorway.errors import InternalError
from tensorway.telemetry.trace_context import SpanContext
from tensorway.tensor_message import varint
from tensorway.v1 import inference_pb2, link_pb2
from tensorway_gateway.requests import GenerationArrival

#: Tag of `RequestHead.generate`, field 11 with a length.
_GENERATE_TAG: Final = b"\x5a"


def write_generation_head(arrival: GenerationArrival, revision: str, trace: SpanContext | None = None, stream_id: str = "") -> bytes:
    """A serialised RequestHead of a new stream. The caller's message goes into it as it came. With `stream_id` "" the orchestrator draws
    one."""
    head = link_pb2.RequestHead(
        request_id=arrival.request_id, model=arrival.model, revision=revision, rows=1, priority=arrival.priority,
        traceparent="" if trace is None else trace.to_wire(), stream_id=stream_id,
    )
    return _with_generate(head, arrival.message)


def write_continued_head(
    arrival: GenerationArrival, revision: str, messages: Sequence[bytes], trace: SpanContext | None = None
) -> bytes | None:
    """A serialised RequestHead of a stream that goes on after `messages`, all that its client has. None where that is the whole answer.

    Raises InternalError where the messages are none of a stream.
    """
    head = link_pb2.RequestHead(
        request_id=arrival.request_id, model=arrival.model, revision=revision, rows=1, priority=arrival.priority,
        so_far=[link_pb2.GenerationSoFar() for _ in range(arrival.num_choices)], traceparent="" if trace is None else trace.to_wire(),
    )
    for message in messages:
        response = _read(message)
        head.next_sequence = response.sequence + 1
        event = response.WhichOneof("event")
        if event == "started":
            head.stream_id, head.seed, head.revision = response.started.stream_id, response.started.seed, response.started.revision
        elif event == "delta":
            delta = response.delta
            so_far = _choice(head, delta.choice)
            if delta.is_prompt:
                so_far.has_prompt = True
            else:
                so_far.token_ids.extend(delta.token_ids)
        elif event == "finished":
            _choice(head, response.finished.choice).is_finished = True
    if not head.stream_id:
        raise InternalError("the orchestrator's stream does not begin with `started`")
    if all(so_far.is_finished for so_far in head.so_far):
        return None
    return _with_generate(head, arrival.message)


def write_resume_head(request_id: str, stream_id: str, next_sequence: int, trace: SpanContext | None = None) -> bytes:
    """A serialised RequestHead that asks for a stream which the orchestrator keeps."""
    position = inference_pb2.Resume(stream_id=stream_id, next_sequence=next_sequence)
    generate = inference_pb2.GenerateRequest(request_id=request_id, resume=position)
    traceparent = "" if trace is None else trace.to_wire()
    return link_pb2.RequestHead(request_id=request_id, rows=1, traceparent=traceparent, generate=generate).SerializeToString()


def sequence_after(message: bytes) -> int:
    """Number of the message that follows `message`. Raises InternalError where it is none of a stream."""
    return _read(message).sequence + 1


def num_tokens(messages: Sequence[bytes], num_messages: int) -> int:
    """Generated tokens in the messages of a stream. Of messages that were not kept, one each: most hold one."""
    deltas = (_read(message).delta for message in messages)
    return sum(len(delta.token_ids) for delta in deltas if not delta.is_prompt) + num_messages - len(messages)


def _with_generate(head: link_pb2.RequestHead, message: bytes) -> bytes:
    return b"".join((head.SerializeToString(), _GENERATE_TAG, varint(len(message)), message))


def _read(message: bytes) -> inference_pb2.GenerateResponse:
    try:
        return inference_pb2.GenerateResponse.FromString(message)
    except DecodeError as error:
        raise InternalError("the orchestrator's token frame is no GenerateResponse") from error


def _choice(head: link_pb2.RequestHead, choice: int) -> link_pb2.GenerationSoFar:
    if choice >= len(head.so_far):
        raise InternalError(f"the orchestrator answered choice {choice} of {len(head.so_far)}")
    return head.so_far[choice]

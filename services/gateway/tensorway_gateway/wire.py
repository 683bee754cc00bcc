"""Between the link's heads and the gateway's dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from google.protobuf.message import DecodeError

from tensorway.errors import InternalError, InvalidRequest
from tensorway.parameter_message import read_parameters, write_parameters
from tensorway.telemetry.trace_context import SpanContext
from tensorway.tensors import Buffer, DataType, TensorHead
from tensorway.transport.port import Payload
from tensorway.v1 import link_pb2
from tensorway_gateway.requests import MAX_NUM_ITEMS, Answer, Arrival, Timing, Value

#: Parameter of an answer in one piece by a model that generates: tokens of all its rows.
NUM_TOKENS: Final = "num_completion_tokens"
#: Element type by number; a number that is no type has no entry.
DTYPES: Final[dict[int, DataType]] = {int(dtype): dtype for dtype in DataType}


def write_request_head(
    arrival: Arrival, revision: str, rows: int, idempotency_key: str = "", trace: SpanContext | None = None
) -> bytes:
    """A serialised RequestHead. The tensors' bytes follow as the payload, in the same order."""
    head = link_pb2.RequestHead(
        request_id=arrival.request_id,
        model=arrival.model,
        revision=revision,
        rows=rows,
        priority=arrival.priority,
        output_names=arrival.output_names,
        inputs=[
            link_pb2.TensorHead(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, num_bytes=len(tensor.data))  # type: ignore[arg-type]
            for tensor in arrival.inputs
        ],
    )
    if idempotency_key:
        head.idempotency_key = idempotency_key
    if trace is not None:
        head.traceparent = trace.to_wire()
    if arrival.parameters:
        write_parameters(arrival.parameters, head.parameters)
    if arrival.explain:
        head.explain.MergeFromString(arrival.explain)
    return head.SerializeToString()


def read_reply(head: bytes, payload: Payload) -> Answer:
    """Raises InternalError where the orchestrator's reply contradicts itself."""
    try:
        reply = link_pb2.ReplyHead.FromString(head)
        response = link_pb2.ResponseHead.FromString(reply.response)
    except DecodeError as error:
        raise InternalError("the orchestrator's reply is no ReplyHead") from error
    outputs: list[TensorHead] = []
    for tensor in response.outputs:
        dtype = DTYPES.get(tensor.dtype)
        if dtype is None:
            raise InternalError(f"output {tensor.name!r} came back with data type {tensor.dtype}, which is none")
        outputs.append(TensorHead(tensor.name, dtype, tuple(tensor.shape), tensor.num_bytes))
    timing = reply.timing
    return Answer(
        outputs=tuple(outputs),
        contents=_cut(outputs, payload),
        revision=reply.revision,
        timing=Timing(
            timing.queue_us, timing.group_us, timing.wait_us, timing.step_us, timing.prepare_us, timing.batch_rows, timing.batch_requests,
            timing.is_first_in_batch, timing.num_attempts, timing.group, timing.num_hedges,
        ),
        parameters=read_parameters(response.parameters) if response.parameters else {},
        model=reply.model,
    )


def read_bounded_parameters(parameters: Mapping[str, Any]) -> Mapping[str, Value]:
    """A request's parameters. Raises InvalidRequest for one without a value, or too many."""
    if not parameters:
        return {}
    if len(parameters) > MAX_NUM_ITEMS:
        raise InvalidRequest(f"parameters: {len(parameters)} are more than {MAX_NUM_ITEMS}", field="parameters")
    return read_parameters(parameters)


def _cut(outputs: list[TensorHead], payload: Payload) -> tuple[Payload, ...]:
    """The segments of each output, none copied. Raises InternalError where the bytes are not exactly those of the outputs."""
    if len(outputs) == 1 and len(payload) == 1 and len(payload[0]) == outputs[0].num_bytes:
        return (payload,)
    segments = iter([segment for segment in payload if len(segment)])
    rest: Buffer = b""
    contents: list[Payload] = []
    for head in outputs:
        pieces: list[Buffer] = []
        missing = head.num_bytes
        while missing:
            if not rest:
                rest = next(segments, b"")
                if not rest:
                    raise InternalError(f"output {head.name!r} lacks {missing} of its {head.num_bytes} bytes")
            view = memoryview(rest)
            pieces.append(view[:missing])
            rest = view[missing:]
            missing -= len(pieces[-1])
        contents.append(tuple(pieces))
    if rest or next(segments, b""):
        raise InternalError("more bytes came back than the outputs have")
    return tuple(contents)

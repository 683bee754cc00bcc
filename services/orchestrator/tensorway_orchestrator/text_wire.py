"""Between Infer's tensors of texts and generations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from tensorway.errors import InvalidRequest
from tensorway.parameter_message import read_parameters, write_parameters
from tensorway.signature import RevisionSpec
from tensorway.telemetry.tracing import NO_TRACER, Tracer
from tensorway.tensors import DataType, check_bytes_elements, decode_bytes, encode_bytes
from tensorway.transport.port import Payload
from tensorway.v1 import inference_pb2, link_pb2
from tensorway_orchestrator.generation_wire import read_generation
from tensorway_orchestrator.streams import Generation

Head = link_pb2.RequestHead

_SAMPLING: Final[dict[str, type]] = {
    "temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float, "seed": int,
}


@dataclass(slots=True)
class FinishedText:
    """The answer to one row as it comes together."""

    parts: list[str] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_attempts: int = 0
    group: str = ""


def read_rows(head: Head, spec: RevisionSpec, payload: Payload, tracer: Tracer = NO_TRACER) -> list[Generation]:
    """A generation for each row of the one input. Raises InvalidRequest, naming the input or the parameter at fault."""
    name = spec.signature.inputs[0].name
    if [tensor.name for tensor in head.inputs] != [name] or int(head.inputs[0].dtype) != int(DataType.BYTES):
        raise InvalidRequest(f"model {spec.model!r} takes one input {name!r} of BYTES", field="inputs")
    content = b"".join(payload)
    check_bytes_elements(content, int(head.inputs[0].shape[0]) if head.inputs[0].shape else 1, f"inputs[{name!r}]")
    request = inference_pb2.GenerateRequest()
    _read_parameters(head, request)
    generations: list[Generation] = []
    for index, text in enumerate(decode_bytes(content)):
        try:
            request.text = text.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"inputs[{name!r}]: row {index} is not UTF-8", field=f"inputs[{name!r}]") from error
        row = link_pb2.RequestHead(
            request_id=head.request_id, model=spec.model, revision=spec.revision, rows=1, priority=head.priority,
            traceparent=head.traceparent, generate=request,
        )
        generations.append(replace(read_generation(row, row.SerializeToString(), tracer), is_resumable=False))
    return generations


def gather(message: bytes, text: FinishedText) -> None:
    """Adds one message of a row's stream."""
    response = inference_pb2.GenerateResponse.FromString(message)
    if response.HasField("delta"):
        text.parts.append(response.delta.text)
    elif response.HasField("finished"):
        finished = response.finished
        text.num_attempts, text.group = finished.num_attempts, finished.group
        text.num_prompt_tokens, text.num_completion_tokens = finished.usage.num_prompt_tokens, finished.usage.num_completion_tokens


def write_texts(
    texts: Sequence[FinishedText], spec: RevisionSpec, arrived_s: float, sent_s: float, now_s: float
) -> tuple[bytes, Payload]:
    """Head and payload of the answer: the one output, BYTES [rows], and as parameters the tokens of all rows. `sent_s` is when the last of
    the rows first left the queue."""
    content = encode_bytes("".join(text.parts).encode() for text in texts)
    output = link_pb2.TensorHead(
        name=spec.signature.outputs[0].name, dtype=int(DataType.BYTES), shape=[len(texts)], num_bytes=len(content),  # type: ignore[arg-type]
    )
    timing = link_pb2.Timing(
        queue_us=int((sent_s - arrived_s) * 1e6),
        group_us=int((now_s - sent_s) * 1e6),
        batch_rows=len(texts),
        batch_requests=1,
        is_first_in_batch=True,
        num_attempts=max((text.num_attempts for text in texts), default=0),
        group=texts[-1].group if texts else "",
    )
    response = link_pb2.ResponseHead(outputs=[output])
    # Named as on a stream of the Open Inference Protocol; the gateway counts the latter against its caller's quota.
    usage = {
        "num_prompt_tokens": sum(text.num_prompt_tokens for text in texts),
        "num_completion_tokens": sum(text.num_completion_tokens for text in texts),
    }
    write_parameters(usage, response.parameters)
    return link_pb2.ReplyHead(response=response.SerializeToString(), revision=spec.revision, timing=timing).SerializeToString(), (content,)


def _read_parameters(head: Head, request: inference_pb2.GenerateRequest) -> None:
    for name, value in read_parameters(head.parameters).items():
        if name in _SAMPLING:
            _set(name, _number(name, value, _SAMPLING[name]), request.sampling)
        elif name == "max_tokens":
            _set(name, _number(name, value, int), request.stop)
        elif name == "stop" and isinstance(value, str):
            request.stop.strings.append(value)
        else:
            known = ", ".join([*_SAMPLING, "max_tokens", "stop (a string)"])
            raise InvalidRequest(f"parameters[{name!r}]: is not one of {known}", field=f"parameters[{name!r}]")


def _number(name: str, value: object, kind: Callable[[Any], object]) -> object:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (kind is int and isinstance(value, float)):
        wanted = "an integer" if kind is int else "a number"
        raise InvalidRequest(f"parameters[{name!r}]: {value!r} is not {wanted}", field=f"parameters[{name!r}]")
    return kind(value)


def _set(name: str, value: object, target: Any) -> None:
    try:
        setattr(target, name, value)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"parameters[{name!r}]: {error}", field=f"parameters[{name!r}]") from error

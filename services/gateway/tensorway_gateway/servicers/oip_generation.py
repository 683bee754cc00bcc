"""A generation in the words of the Open Inference Protocol v2: one text in, pieces of text out.

The request has one input `text`, BYTES of shape [1] or [1, 1], and says how to generate by parameters named like the fields of
`tensorway.v1.Sampling` and `Stop`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from tensorway.compat import grpc_service_pb2
from tensorway.errors import InvalidRequest
from tensorway.tensor_message import varint
from tensorway.tensors import Buffer, DataType, check_bytes_elements, decode_bytes, encode_bytes
from tensorway.v1 import inference_pb2
from tensorway_gateway.requests import GenerationArrival, Value
from tensorway_gateway.servicers.generation_check import check_generate
from tensorway_gateway.servicers.oip import (
    FINAL_RESPONSE,
    RAW_OUTPUT_TAG,
    check_outputs,
    for_model,
    priority,
    read_own_parameters,
    timeout_s,
)
from tensorway_gateway.servicers.oip_tensors import read_inputs

#: Name of the input and of the output.
TEXT: Final = "text"
#: Parameter by which a caller asks for an empty response after the last piece.
_WANTS_END: Final = "triton_enable_empty_final_response"
_ONE: Final = ((1,), (1, 1))
#: Parameter -> message of the request, its field, and the types it may have.
_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_STOP: Final = ("max_tokens", "min_tokens", "ignore_eos", "include_stop")
#: Ends the answer before it; one text, for a parameter holds no list.
_STOP_STRING: Final = "stop"


class OipGeneration:
    """One request, and how its answer is written. `write` takes the stream's messages for the native dialect."""

    __slots__ = ("_prefix", "_request", "_send", "_version", "_wants_end", "arrival")

    def __init__(
        self, request: grpc_service_pb2.ModelInferRequest, lifted: Mapping[int, Buffer], request_id: str, arrived_s: float,
        version: str, send: Callable[[bytes], Awaitable[None]],
    ) -> None:
        """`send` takes a serialised ModelInferResponse. Raises InvalidRequest, naming the input or parameter at fault."""
        parameters = read_own_parameters(request)
        shape, text = _read_text(request, lifted)
        self._request = request
        self._version = version
        self._send = send
        self._wants_end = parameters.get(_WANTS_END) is True
        self._prefix = self._response([(TEXT, shape)], {FINAL_RESPONSE: False}).SerializeToString()
        generate = _write_request(request, text, for_model(parameters), priority(parameters))
        self.arrival: Final = GenerationArrival(
            model=request.model_name, revision=request.model_version, is_version=True, request_id=request_id,
            message=generate.SerializeToString(), num_choices=1, priority=generate.priority, timeout_s=timeout_s(parameters),
            arrived_s=arrived_s,
        )

    async def write(self, message: bytes) -> None:
        """A serialised GenerateResponse: each delta becomes a response, and the end one where it is asked for."""
        response = inference_pb2.GenerateResponse.FromString(message)
        event = response.WhichOneof("event")
        if event == "delta":
            content = encode_bytes([response.delta.text.encode()])
            await self._send(b"".join((self._prefix, RAW_OUTPUT_TAG, varint(len(content)), content)))
        elif event == "finished" and self._wants_end:
            finished = response.finished
            reason = inference_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower()
            told: dict[str, Value] = {
                FINAL_RESPONSE: True, "finish_reason": reason, "num_prompt_tokens": finished.usage.num_prompt_tokens,
                "num_completion_tokens": finished.usage.num_completion_tokens,
            }
            await self._send(self._response([], told).SerializeToString())

    def offer(self, message: bytes) -> bool:
        """None is taken at once: generations share one stream, and each message becomes another."""
        return False

    def _response(self, outputs: list[tuple[str, tuple[int, ...]]], parameters: Mapping[str, Value]) -> Any:
        tensor = grpc_service_pb2.ModelInferResponse.InferOutputTensor
        response = grpc_service_pb2.ModelInferResponse(
            model_name=self._request.model_name, model_version=self._version, id=self._request.id,
            outputs=[tensor(name=name, datatype=DataType.BYTES.name, shape=shape) for name, shape in outputs],
        )
        for name, value in parameters.items():
            parameter = response.parameters[name]
            if isinstance(value, bool):
                parameter.bool_param = value
            elif isinstance(value, int):
                parameter.int64_param = value
            else:
                parameter.string_param = str(value)
        return response


def _read_text(request: grpc_service_pb2.ModelInferRequest, lifted: Mapping[int, Buffer]) -> tuple[tuple[int, ...], str]:
    """Shape and text of the one input."""
    check_outputs(request)
    for output in request.outputs:
        if output.name != TEXT:
            raise InvalidRequest(f"output {output.name!r}: a generation has the one output {TEXT!r}", field=f"output {output.name!r}")
    inputs = read_inputs(request, lifted)
    if len(inputs) != 1 or inputs[0].name != TEXT:
        given = ", ".join(repr(tensor.name) for tensor in inputs) or "none"
        raise InvalidRequest(f"inputs: a generation on a stream takes the one input {TEXT!r}, got {given}", field="inputs")
    (tensor,) = inputs
    where = f"input {TEXT!r}"
    if tensor.dtype is not DataType.BYTES or tensor.shape not in _ONE:
        raise InvalidRequest(
            f"{where}: must be BYTES of shape [1] or [1, 1], got {tensor.dtype.name} of {list(tensor.shape)}; send each text as a request "
            "of its own", field=where,
        )
    check_bytes_elements(tensor.data, 1, where)
    try:
        return tensor.shape, decode_bytes(tensor.data)[0].decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{where}: is not UTF-8: {error.reason} at byte {error.start}", field=where) from error


def _write_request(
    request: grpc_service_pb2.ModelInferRequest, text: str, parameters: Mapping[str, Value], level: int
) -> inference_pb2.GenerateRequest:
    generate = inference_pb2.GenerateRequest(model=request.model_name, request_id=request.id, text=text, priority=level)
    for name, value in parameters.items():
        try:
            if name in _SAMPLING:
                setattr(generate.sampling, name, _number(name, value))
            elif name in _STOP:
                setattr(generate.stop, name, value)
            elif name == _STOP_STRING:
                generate.stop.strings.append(value)  # type: ignore[arg-type]  # refused by protobuf
            else:
                known = ", ".join((*_SAMPLING, *_STOP, _STOP_STRING))
                raise InvalidRequest(f"parameter {name!r}: is not one of a generation: {known}", field=f"parameter {name!r}")
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"parameter {name!r}: {value!r} does not fit: {error}", field=f"parameter {name!r}") from error
    check_generate(generate)
    return generate


def _number(name: str, value: Value) -> Value:
    """protobuf would take True for 1."""
    if isinstance(value, bool):
        raise TypeError(f"{name} is a number")
    return value

"""`inference.GRPCInferenceService/ModelInfer`: inference in the Open Inference Protocol v2."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from google.protobuf.message import DecodeError

from tensorway.compat import grpc_service_pb2
from tensorway.errors import InvalidRequest, TensorwayError
from tensorway.parameter_message import write_parameters
from tensorway.tensor_message import varint
from tensorway.tensors import Buffer
from tensorway.transport.port import Call, Server
from tensorway_gateway.lifting import lift_raw_contents
from tensorway_gateway.path import RequestPath
from tensorway_gateway.requests import MAX_NUM_ITEMS, MAX_PRIORITY, MIN_PRIORITY, Answered, Arrival, Value
from tensorway_gateway.servicers.oip_tensors import (
    BINARY_OUTPUT,
    oip_field,
    read_inputs,
    refuse_unserved_parameters,
    write_contents,
)

SERVICE: Final = "inference.GRPCInferenceService"
#: Tag of `ModelInferResponse.raw_output_contents`, field 6 with a length.
RAW_OUTPUT_TAG: Final = b"\x32"
#: Parameter of every response on a stream: whether it is the last to its request.
FINAL_RESPONSE: Final = "triton_final_response"
_MAX_INT64: Final = 2**63 - 1
_SEQUENCE: Final = ("sequence_id", "sequence_start", "sequence_end")
#: Said to other servers of this protocol, meaningless here, and not meant for the model.
_NOT_FOR_MODELS: Final = frozenset({"headers", BINARY_OUTPUT, "priority", "timeout", *_SEQUENCE})


class OipServicer:
    """Answers ModelInfer."""

    def __init__(self, path: RequestPath) -> None:
        self._path = path

    def attach(self, server: Server) -> None:
        server.add_unary(f"/{SERVICE}/ModelInfer", self.model_infer)

    async def model_infer(self, message: bytes, call: Call) -> bytes:
        """ModelInferRequest bytes in, ModelInferResponse bytes out; outputs are raw, unless `binary_data_output` is false."""
        arrived_s = time.monotonic()
        try:
            request, arrival = self._read(message, arrived_s)
        except TensorwayError as error:
            self._path.unread(call, len(message), arrived_s, error)
            raise
        return write_response(await self._path.run(arrival, call), request)

    def _read(self, message: bytes, arrived_s: float) -> tuple[grpc_service_pb2.ModelInferRequest, Arrival]:
        message, lifted = lift_raw_contents(message)
        try:
            request = grpc_service_pb2.ModelInferRequest.FromString(message)
        except DecodeError as error:
            raise InvalidRequest("the message is no ModelInferRequest", field="request") from error
        return request, read_arrival(request, lifted, self._path.request_id(request.id), arrived_s)


def read_arrival(
    request: grpc_service_pb2.ModelInferRequest, lifted: Mapping[int, Buffer], request_id: str, arrived_s: float
) -> Arrival:
    """One inference request; `lifted` as in `read_inputs`. Raises InvalidRequest or Unimplemented, naming what is wrong."""
    inputs = read_inputs(request, lifted)
    check_outputs(request)
    parameters = read_own_parameters(request)
    return Arrival(
        model=request.model_name, revision=request.model_version, is_version=True, request_id=request_id,
        inputs=inputs, output_names=tuple([output.name for output in request.outputs]),
        parameters=for_model(parameters), priority=priority(parameters), timeout_s=timeout_s(parameters),
        num_bytes=sum([len(tensor.data) for tensor in inputs]), arrived_s=arrived_s, field_path=oip_field,
    )


def check_outputs(request: grpc_service_pb2.ModelInferRequest) -> None:
    """Raises InvalidRequest for too many requested outputs, Unimplemented for what is not served of them."""
    if len(request.outputs) > MAX_NUM_ITEMS:
        raise InvalidRequest(f"outputs: {len(request.outputs)} are more than {MAX_NUM_ITEMS}", field="outputs")
    for output in request.outputs:
        if output.parameters:
            refuse_unserved_parameters(f"output {output.name!r}", output.parameters)


def read_own_parameters(request: grpc_service_pb2.ModelInferRequest) -> dict[str, Value]:
    """All parameters of the request. Raises InvalidRequest for one without a value, too large a number, or a sequence."""
    return _read_parameters(request.parameters) if request.parameters else {}


def for_model(parameters: Mapping[str, Value]) -> dict[str, Value]:
    """Those that the protocol does not keep for itself."""
    return {name: value for name, value in parameters.items() if name not in _NOT_FOR_MODELS and not name.startswith("triton_")}


def _read_parameters(parameters: Mapping[str, grpc_service_pb2.InferParameter]) -> dict[str, Value]:
    if len(parameters) > MAX_NUM_ITEMS:
        raise InvalidRequest(f"parameters: {len(parameters)} are more than {MAX_NUM_ITEMS}", field="parameters")
    found: dict[str, Value] = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidRequest(f"parameter {name!r}: has no value", field=f"parameter {name!r}")
        value: Value = getattr(parameter, kind)
        if isinstance(value, int) and value > _MAX_INT64:
            raise InvalidRequest(f"parameter {name!r}: {value} is more than {_MAX_INT64}", field=f"parameter {name!r}")
        found[name] = value
    for name in _SEQUENCE:
        # 0, "" and False say "no sequence", which is what every request is here.
        if found.get(name):
            raise InvalidRequest(f"parameter {name!r}: sequences are not served; requests are independent", field=f"parameter {name!r}")
    return found


def _whole(parameters: Mapping[str, Value], name: str) -> int:
    value = parameters.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequest(f"parameter {name!r}: must be a whole number of at least 0, got {value!r}", field=f"parameter {name!r}")
    return value


def priority(parameters: Mapping[str, Value]) -> int:
    """The protocol counts 1, 2, 3… from the highest down, and 0 is the default; ours go from 100 down to -100 with 0 in the middle."""
    level = _whole(parameters, "priority")
    return 0 if level == 0 else max(MIN_PRIORITY, MAX_PRIORITY + 1 - level)


def timeout_s(parameters: Mapping[str, Value]) -> float | None:
    """`timeout` is in microseconds; 0 and unset mean none."""
    timeout_us = _whole(parameters, "timeout")
    return timeout_us / 1e6 if timeout_us else None


def wants_typed(request: grpc_service_pb2.ModelInferRequest) -> bool:
    """Whether the client asks for typed contents, as a REST client does who wants numbers and not base64."""
    wish = request.parameters.get(BINARY_OUTPUT)
    return wish is not None and wish.WhichOneof("parameter_choice") == "bool_param" and not wish.bool_param


def write_response(answered: Answered, request: grpc_service_pb2.ModelInferRequest, *, is_last_of_stream: bool = False) -> bytes:
    """A serialised ModelInferResponse. Raw contents are framed by hand, so that their bytes are copied once, into the message. Raises
    InvalidRequest where typed contents are asked for and an output has none."""
    answer = answered.answer
    tensor = grpc_service_pb2.ModelInferResponse.InferOutputTensor
    response = grpc_service_pb2.ModelInferResponse(
        model_name=answered.model, model_version=answered.version, id=request.id,
        outputs=[tensor(name=head.name, datatype=head.dtype.name, shape=head.shape) for head in answer.outputs],
    )
    write_parameters(answer.parameters, response.parameters, "param")
    if is_last_of_stream:
        response.parameters[FINAL_RESPONSE].bool_param = True
    if wants_typed(request):
        for head, content, output in zip(answer.outputs, answer.contents, response.outputs, strict=True):
            write_contents(head, content, output.contents)
        return response.SerializeToString()
    parts: list[bytes | memoryview] = [response.SerializeToString()]
    for head, content in zip(answer.outputs, answer.contents, strict=True):
        parts += (RAW_OUTPUT_TAG, varint(head.num_bytes), *content)
    return b"".join(parts)

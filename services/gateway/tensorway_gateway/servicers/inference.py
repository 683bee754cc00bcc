"""`tensorway.v1.InferenceService`: the native dialect."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from google.protobuf.message import DecodeError

from tensorway.errors import InvalidRequest, TensorwayError
from tensorway.parameter_message import write_parameters
from tensorway.tensor_message import tensor_field
from tensorway.tensors import Buffer, Tensor
from tensorway.transport.port import Call, Server
from tensorway.v1 import inference_pb2
from tensorway_gateway.lifting import lift_tensors
from tensorway_gateway.path import RequestPath
from tensorway_gateway.requests import MAX_NUM_DIMENSIONS, MAX_NUM_ITEMS, Answered, Arrival
from tensorway_gateway.wire import DTYPES, read_bounded_parameters

#: Points of integrated gradients where the request does not say.
DEFAULT_NUM_POINTS: Final = 50
SERVICE: Final = "tensorway.v1.InferenceService"


class InferenceServicer:
    """Answers Infer and Explain."""

    def __init__(self, path: RequestPath) -> None:
        self._path = path

    def attach(self, server: Server) -> None:
        server.add_unary(f"/{SERVICE}/Infer", self.infer)
        server.add_unary(f"/{SERVICE}/Explain", self.explain)

    async def infer(self, message: bytes, call: Call) -> bytes:
        """InferRequest bytes in, InferResponse bytes out."""
        arrived_s = time.monotonic()
        try:
            arrival = self._read(message, arrived_s)
        except TensorwayError as error:
            self._path.unread(call, len(message), arrived_s, error)
            raise
        return _write(await self._path.run(arrival, call))

    async def explain(self, message: bytes, call: Call) -> bytes:
        """ExplainRequest bytes in, ExplainResponse bytes out: an InferResponse has the same fields."""
        arrived_s = time.monotonic()
        try:
            arrival = self._read_explain(message, arrived_s)
        except TensorwayError as error:
            self._path.unread(call, len(message), arrived_s, error)
            raise
        return _write(await self._path.run(arrival, call))

    def _read_explain(self, message: bytes, arrived_s: float) -> Arrival:
        message, lifted = lift_tensors(message)
        try:
            request = inference_pb2.ExplainRequest.FromString(message)
        except DecodeError as error:
            raise InvalidRequest("the message is no ExplainRequest", field="request") from error
        # Set even where no option is: its presence is what tells the request apart.
        request.options.num_points = request.options.num_points or DEFAULT_NUM_POINTS
        return self._arrival(request, (), lifted, arrived_s, request.options.SerializeToString())

    def _read(self, message: bytes, arrived_s: float) -> Arrival:
        message, lifted = lift_tensors(message)
        try:
            request = inference_pb2.InferRequest.FromString(message)
        except DecodeError as error:
            raise InvalidRequest("the message is no InferRequest", field="request") from error
        return self._arrival(request, tuple(request.output_names), lifted, arrived_s, b"", request.idempotency_key)

    def _arrival(
        self, request: inference_pb2.InferRequest | inference_pb2.ExplainRequest, output_names: tuple[str, ...],
        lifted: Mapping[int, Buffer], arrived_s: float, explain: bytes, idempotency_key: str = "",
    ) -> Arrival:
        if len(request.inputs) > MAX_NUM_ITEMS or len(output_names) > MAX_NUM_ITEMS:
            raise InvalidRequest(f"inputs: more than {MAX_NUM_ITEMS} inputs or output names", field="inputs")
        num_bytes = 0
        inputs: list[Tensor] = []
        for index, tensor in enumerate(request.inputs):
            dtype = DTYPES.get(tensor.dtype)
            if dtype is None:
                raise InvalidRequest(f"inputs[{index}].dtype: {tensor.dtype} is no data type", field=f"inputs[{index}].dtype")
            if len(tensor.shape) > MAX_NUM_DIMENSIONS:
                raise InvalidRequest(f"inputs[{index}].shape: has {len(tensor.shape)} dimensions", field=f"inputs[{index}].shape")
            # Each access of a bytes field copies it: once is enough.
            large = lifted.get(index)
            content: Buffer = tensor.data if large is None else large
            num_bytes += len(content)
            inputs.append(Tensor(tensor.name, dtype, tuple(tensor.shape), content))
        return Arrival(
            model=request.model, revision=request.revision, is_version=False, request_id=self._path.request_id(request.request_id),
            inputs=tuple(inputs), output_names=output_names, parameters=read_bounded_parameters(request.parameters),
            priority=request.priority, timeout_s=None, num_bytes=num_bytes, arrived_s=arrived_s,
            explain=explain, idempotency_key=idempotency_key,
        )


def _write(answered: Answered) -> bytes:
    """A serialised InferResponse. Tensors are framed by hand, so that their bytes are copied once, into the message."""
    answer = answered.answer
    response = inference_pb2.InferResponse(model=answered.model, revision=answer.revision, request_id=answered.request_id)
    if answer.parameters:
        write_parameters(answer.parameters, response.parameters)
    parts: list[bytes | memoryview] = [response.SerializeToString()]
    for head, content in zip(answer.outputs, answer.contents, strict=True):
        parts += tensor_field(head, content)
    return b"".join(parts)

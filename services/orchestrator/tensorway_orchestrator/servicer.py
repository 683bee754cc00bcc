"""`InferenceService` of the orchestrator itself, so that this hop can be called alone (grpcurl). Takes the same queue as the link."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from tensorway.deadline import DEFAULT_TIMEOUT_S, Deadline
from tensorway.errors import InternalError, InvalidRequest, TensorwayError
from tensorway.signature import RevisionSpec
from tensorway.tensors import DataType, check_num_bytes
from tensorway.transport.port import Call, Payload, Reply, Server, Stream
from tensorway.transport.streamed_exchange import StreamedExchange
from tensorway.v1 import inference_pb2, link_pb2, tensor_pb2
from tensorway_orchestrator.dispatcher import Dispatcher

INFER = "/tensorway.v1.InferenceService/Infer"
EXPLAIN = "/tensorway.v1.InferenceService/Explain"
GENERATE = "/tensorway.v1.InferenceService/Generate"
_Request = inference_pb2.InferRequest | inference_pb2.ExplainRequest


class InferenceServicer:
    """Turns a call into an exchange and back."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def attach(self, server: Server) -> None:
        server.add_unary(INFER, self.infer)
        server.add_unary(EXPLAIN, self.explain)
        server.add_stream(GENERATE, self.generate)

    async def infer(self, request_bytes: bytes, call: Call) -> bytes:
        try:
            request = inference_pb2.InferRequest.FromString(request_bytes)
        except DecodeError as error:
            raise InvalidRequest("the message is not an InferRequest", field="request") from error
        head = link_pb2.RequestHead(output_names=request.output_names, idempotency_key=request.idempotency_key)
        return await self._run(request, head, call)

    async def explain(self, request_bytes: bytes, call: Call) -> bytes:
        try:
            request = inference_pb2.ExplainRequest.FromString(request_bytes)
        except DecodeError as error:
            raise InvalidRequest("the message is not an ExplainRequest", field="request") from error
        # Set even where no option is: its presence is what tells the request apart.
        head = link_pb2.RequestHead()
        head.explain.CopyFrom(request.options)
        return await self._run(request, head, call)

    async def generate(self, stream: Stream) -> None:
        """One message in, the stream of a generation out."""
        try:
            request = inference_pb2.GenerateRequest.FromString(await stream.read() or b"")
        except DecodeError as error:
            raise InvalidRequest("the message is not a GenerateRequest", field="request") from error
        head = link_pb2.RequestHead(
            request_id=request.request_id, model=request.model, revision=request.revision, rows=1, priority=request.priority,
            generate=request,
        )
        exchange = StreamedExchange(head.SerializeToString(), stream.deadline or Deadline.after(self._default_timeout_s(request)))
        stream.on_cancel(exchange.cancel)
        self._dispatcher.on_exchange(exchange)
        try:
            await exchange.relay(stream)
        finally:
            exchange.cancel()

    def _default_timeout_s(self, request: inference_pb2.GenerateRequest) -> float:
        if request.WhichOneof("prompt") == "resume":
            return DEFAULT_TIMEOUT_S
        return self._dispatcher.lane(request.model, request.revision).spec.default_timeout_s or DEFAULT_TIMEOUT_S

    async def _run(self, request: _Request, head: link_pb2.RequestHead, call: Call) -> bytes:
        """An InferResponse; an ExplainResponse has the same fields."""
        lane = self._dispatcher.lane(request.model, request.revision)
        payload = _fill_head(head, request, lane.spec)
        deadline = call.deadline or Deadline.after(lane.spec.default_timeout_s or DEFAULT_TIMEOUT_S)
        exchange = UnaryExchange(head.SerializeToString(), payload, deadline)
        call.on_cancel(exchange.cancel)
        self._dispatcher.on_exchange(exchange)
        reply = await exchange.outcome
        return _to_response(request, reply).SerializeToString()


@dataclass(slots=True, eq=False)
class UnaryExchange:
    """An exchange whose answer is awaited instead of sent over a link."""

    head: bytes
    payload: Payload
    deadline: Deadline
    outcome: asyncio.Future[Reply] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    _on_cancel: list[Callable[[], None]] = field(default_factory=list)

    @property
    def credit(self) -> int:
        """See `tensorway.transport.port.Exchange`: an answer in one piece takes no tokens."""
        return 0

    def push(self, head: bytes) -> None:
        raise InternalError("a token is pushed to a unary call")

    def on_credit(self, callback: Callable[[], None]) -> None:
        """Never comes."""

    def reply(self, head: bytes, payload: Payload) -> None:
        if not self.outcome.done():
            self.outcome.set_result(Reply(head, payload))

    def fail(self, error: TensorwayError) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)

    def on_cancel(self, callback: Callable[[], None]) -> None:
        self._on_cancel.append(callback)

    def cancel(self) -> None:
        """The caller has gone."""
        for callback in self._on_cancel:
            callback()
        self.outcome.cancel()


def _fill_head(head: link_pb2.RequestHead, request: _Request, spec: RevisionSpec) -> Payload:
    """Describes `request` in `head`; returns its tensors' bytes."""
    head.request_id, head.model, head.revision = request.request_id, request.model, request.revision
    head.rows, head.priority = 1, request.priority
    for name, value in request.parameters.items():
        head.parameters[name].CopyFrom(value)
    payload: list[bytes] = []
    for index, tensor in enumerate(request.inputs):
        path = f"inputs[{index}]"
        if tensor.dtype not in DataType._value2member_map_:
            raise InvalidRequest(f"{path}.dtype: {tensor.dtype} is no data type", field=f"{path}.dtype")
        content = tensor.data
        check_num_bytes(DataType(tensor.dtype), tensor.shape, content, path)
        head.inputs.add(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, num_bytes=len(content))
        payload.append(content)
        if spec.signature.is_batchable:
            head.rows = tensor.shape[0] if tensor.shape else 1
    return tuple(payload)


def _to_response(request: _Request, reply: Reply) -> inference_pb2.InferResponse:
    head = link_pb2.ReplyHead.FromString(reply.head)
    outputs = link_pb2.ResponseHead.FromString(head.response)
    response = inference_pb2.InferResponse(model=head.model or request.model, revision=head.revision, request_id=request.request_id)
    for name, value in outputs.parameters.items():
        response.parameters[name].CopyFrom(value)
    content, offset = b"".join(reply.payload), 0
    for tensor in outputs.outputs:
        response.outputs.append(tensor_pb2.Tensor(
            name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, data=content[offset : offset + tensor.num_bytes]
        ))
        offset += tensor.num_bytes
    return response

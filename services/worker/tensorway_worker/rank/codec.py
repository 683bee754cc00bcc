"""Between the wire's messages and a leader's dataclasses; with `explain_codec.py` the only module of the rank that sees protobuf."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from tensorway.errors import InvalidRequest, NotFound, TensorwayError
from tensorway.model import Parameters
from tensorway.parameter_message import read_parameters, write_parameters
from tensorway.tensors import Buffer
from tensorway.transport.port import Payload
from tensorway.v1 import inference_pb2, link_pb2, tensor_pb2
from tensorway_worker.rank.batch import Request
from tensorway_worker.rank.explain_codec import read_order
from tensorway_worker.rank.layout import Layout, Layouts
from tensorway_worker.rank.outputs import Answer, OutputHead

_NO_PARAMETERS: Final[Parameters] = {}
#: Heads kept in each direction: nearly all requests and answers of a model describe the same few shapes.
_MAX_CACHED: Final = 2048
_MAX_DEADLINE_S: Final = 3600.0

CheckRequest = Callable[[Request], None]


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch as received. A request that cannot be read stands as its error, in place."""

    batch_id: int
    epoch: int
    requests: tuple[Request | TensorwayError, ...]
    num_bytes: int
    #: Of the first sampled request in it, as the orchestrator wrote it; empty: none is sampled.
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Times:
    """Where a batch spent its time at the leader, microseconds."""

    wait_us: int
    step_us: int
    prepare_us: int


class Codec:
    """Reads batches of one model and writes their replies. Used by one thread per method at a time."""

    def __init__(self, model: str, revision: str, layouts: Layouts, check: CheckRequest) -> None:
        self._model = model
        self._revision = revision
        self._layouts = layouts
        self._check = check
        self._layout_of: dict[tuple[bytes, ...], Layout] = {}
        self._responses: dict[tuple[OutputHead, ...], bytes] = {}

    def read_batch(self, head: bytes, payload: Payload) -> Batch:
        """Raises InvalidRequest where the head is no BatchHead or does not describe the payload."""
        try:
            message = link_pb2.BatchHead.FromString(head)
            heads = [link_pb2.RequestHead.FromString(one) for one in message.requests]
        except DecodeError as error:
            raise InvalidRequest("the head is not a BatchHead of RequestHeads", field="head") from error
        remaining = message.remaining_us
        if len(remaining) != len(heads) or not heads:
            raise InvalidRequest(f"{len(heads)} requests come with {len(remaining)} deadlines", field="remaining_us")
        now_s = time.monotonic()
        body = _Body(payload)
        requests = tuple(self._request(one, body, now_s, us) for one, us in zip(heads, remaining, strict=True))
        if body.num_left:
            raise InvalidRequest(f"{body.num_left} bytes follow the last tensor of the batch", field="body")
        traceparent = ""
        for one in heads:
            if one.traceparent:
                traceparent = one.traceparent
                break
        return Batch(message.batch_id, message.epoch, requests, body.num_bytes, traceparent)

    def _request(self, head: link_pb2.RequestHead, body: _Body, now_s: float, remaining_us: int) -> Request | TensorwayError:
        # Serialised heads are the cheapest key there is; reading their fields one by one costs more than the whole rest.
        key = tuple([one.SerializeToString() for one in head.inputs])
        layout = self._layout_of.get(key)
        if layout is None:
            layout = self._new_layout(key, head)
        if layout.error is not None:
            body.take(layout.num_bytes)
            return _again(layout.error)
        names = head.output_names
        data = tuple([body.take(item.num_bytes) for item in layout.inputs])
        try:
            parameters = read_parameters(head.parameters) if head.parameters else _NO_PARAMETERS
        except InvalidRequest as error:
            return error
        request = Request(
            head.request_id,
            layout,
            data,
            tuple(names) if names else (),
            parameters,
            now_s + (remaining_us / 1e6 if remaining_us else _MAX_DEADLINE_S),
        )
        if head.HasField("explain"):
            return _explained(request, head.explain)
        return self._checked(request) if names else request

    def _new_layout(self, key: tuple[bytes, ...], head: link_pb2.RequestHead) -> Layout:
        if len(self._layout_of) >= _MAX_CACHED:
            self._layout_of.clear()
        layout = self._layouts.of(tuple((one.name, one.dtype, tuple(one.shape), one.num_bytes) for one in head.inputs))
        self._layout_of[key] = layout
        return layout

    def _checked(self, request: Request) -> Request | TensorwayError:
        try:
            self._check(request)
        except InvalidRequest as error:
            return error
        return request

    def write_reply(self, results: Sequence[Answer | TensorwayError], times: Times) -> tuple[bytes, Payload]:
        """Head and payload of a BatchReplyHead; no output byte is copied."""
        message = link_pb2.BatchReplyHead(wait_us=times.wait_us, step_us=times.step_us, prepare_us=times.prepare_us)
        add = message.results.add
        payload: list[Buffer] = []
        for result in results:
            if isinstance(result, Answer):
                heads = result.heads
                num_bytes = heads[0][3] if len(heads) == 1 else sum([head[3] for head in heads])
                response = self._response(heads)
                if result.parameters:
                    # Messages of one type may be joined by their bytes: the cached part stays as it is.
                    extra = link_pb2.ResponseHead()
                    write_parameters(result.parameters, extra.parameters)
                    response += extra.SerializeToString()
                add(response=response, body_bytes=num_bytes)
                payload += result.payload
            else:
                add(error=_detail(result))
        return message.SerializeToString(), tuple(payload)

    def _response(self, heads: tuple[OutputHead, ...]) -> bytes:
        response = self._responses.get(heads)
        if response is None:
            if len(self._responses) >= _MAX_CACHED:
                self._responses.clear()
            outputs = [link_pb2.TensorHead(name=name, dtype=dtype, shape=shape, num_bytes=size) for name, dtype, shape, size in heads]  # type: ignore[arg-type]
            response = self._responses[heads] = link_pb2.ResponseHead(outputs=outputs).SerializeToString()
        return response

    def read_infer(self, message: bytes, deadline_s: float) -> Request:
        """One InferRequest. Raises InvalidRequest, or NotFound for a model or revision that is not the one here."""
        try:
            infer = inference_pb2.InferRequest.FromString(message)
        except DecodeError as error:
            raise InvalidRequest("the message is not an InferRequest") from error
        request = self._read_unary(infer, tuple(infer.output_names), deadline_s)
        self._check(request)
        return request

    def read_explain(self, message: bytes, deadline_s: float) -> Request:
        """One ExplainRequest; raises like `read_infer`."""
        try:
            explain = inference_pb2.ExplainRequest.FromString(message)
        except DecodeError as error:
            raise InvalidRequest("the message is not an ExplainRequest") from error
        request = _explained(self._read_unary(explain, (), deadline_s), explain.options)
        if isinstance(request, TensorwayError):
            raise request
        return request

    def _read_unary(
        self, infer: inference_pb2.InferRequest | inference_pb2.ExplainRequest, output_names: tuple[str, ...], deadline_s: float
    ) -> Request:
        if infer.model != self._model:
            raise NotFound(f"this group serves {self._model}, not {infer.model!r}", field="model")
        if infer.revision and not self._revision.startswith(infer.revision):
            raise NotFound(f"this group serves revision {self._revision}, not {infer.revision}", field="revision")
        layout = self._layouts.of(tuple((one.name, one.dtype, tuple(one.shape), len(one.data)) for one in infer.inputs))
        if layout.error is not None:
            raise _again(layout.error)
        data = tuple((one.data,) for one in infer.inputs)
        return Request(infer.request_id, layout, data, output_names, read_parameters(infer.parameters), deadline_s)

    def write_infer(self, request_id: str, answer: Answer) -> bytes:
        """One InferResponse; an ExplainResponse has the same fields."""
        outputs = [
            tensor_pb2.Tensor(name=name, dtype=dtype, shape=shape, data=bytes(data))  # type: ignore[arg-type]
            for (name, dtype, shape, _), data in zip(answer.heads, answer.payload, strict=True)
        ]
        response = inference_pb2.InferResponse(model=self._model, revision=self._revision, request_id=request_id, outputs=outputs)
        write_parameters(answer.parameters, response.parameters)
        return response.SerializeToString()


def _explained(request: Request, options: inference_pb2.ExplainOptions) -> Request | TensorwayError:
    try:
        return request._replace(explain=read_order(options))
    except InvalidRequest as error:
        return error


def _detail(error: TensorwayError) -> link_pb2.ErrorDetail:
    return link_pb2.ErrorDetail(
        reason=error.reason,
        status=error.status,
        message=error.message,
        field=error.field,
        hop=error.hop,
        retry_after_us=int(error.retry_after_s * 1e6),
    )


def _again(error: InvalidRequest) -> InvalidRequest:
    """A fresh exception with the same words: one that is kept in a cache must not gather tracebacks."""
    return InvalidRequest(error.message, field=error.field)


class _Body:
    """Cuts consecutive pieces off a payload without copying."""

    __slots__ = ("_index", "_offset", "_segments", "num_bytes", "num_left")

    def __init__(self, payload: Payload) -> None:
        self._segments = [memoryview(segment) for segment in payload]
        self._index = 0
        self._offset = 0
        self.num_bytes = self.num_left = sum(map(len, payload))

    def take(self, num_bytes: int) -> Payload:
        """The next `num_bytes` bytes. Raises InvalidRequest where fewer are left."""
        if num_bytes > self.num_left:
            raise InvalidRequest(f"the batch lacks {num_bytes - self.num_left} bytes", field="body")
        self.num_left -= num_bytes
        offset = self._offset
        if num_bytes and offset + num_bytes < len(self._segments[self._index]):
            self._offset = offset + num_bytes
            return (self._segments[self._index][offset : offset + num_bytes],)
        pieces: list[Buffer] = []
        while num_bytes:
            segment = self._segments[self._index]
            end = self._offset + num_bytes
            piece = segment[self._offset : end]
            num_bytes -= len(piece)
            if end >= len(segment):
                self._index, self._offset = self._index + 1, 0
            else:
                self._offset = end
            if len(piece):
                pieces.append(piece)
        return tuple(pieces) or (b"",)

"""`inference.GRPCInferenceService/ModelStreamInfer`: many requests on one stream, and several responses to those that generate.

What goes wrong with one request is said in its response's `error_message`, and the stream goes on; a client that prefers a status sends the
metadata `triton_grpc_error: true`, and the first error ends the stream. Responses of models that do not generate come in the order of their
requests; those of generations as they are made.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final

from google.protobuf.message import DecodeError

from tensorway.compat import grpc_service_pb2
from tensorway.deadline import Deadline
from tensorway.errors import Cancelled, InvalidRequest, NotFound, PermissionDenied, TensorwayError, Unauthenticated, Unavailable
from tensorway.tensor_message import varint
from tensorway.transport.port import Server, Stream
from tensorway_gateway.generation_path import GenerationPath
from tensorway_gateway.lifting import lift_raw_contents
from tensorway_gateway.path import RequestPath
from tensorway_gateway.requests import Arrival
from tensorway_gateway.servicers.oip import FINAL_RESPONSE, SERVICE, read_arrival, write_response
from tensorway_gateway.servicers.oip_generation import OipGeneration

#: Requests of one stream that may run at once; while so many do, no more are read.
MAX_RUNNING: Final = 64
#: Tag of `ModelStreamInferResponse.infer_response`, field 2 with a length.
_RESPONSE_TAG: Final = b"\x12"
_STATUS_WISH: Final = "triton_grpc_error"


class OipStreamServicer:
    """Answers ModelStreamInfer."""

    def __init__(self, path: RequestPath, generations: GenerationPath) -> None:
        self._path = path
        self._generations = generations

    def attach(self, server: Server) -> None:
        server.add_stream(f"/{SERVICE}/ModelStreamInfer", self.stream_infer)

    async def stream_infer(self, stream: Stream) -> None:
        """ModelInferRequest bytes in, ModelStreamInferResponse bytes out."""
        conversation = _Conversation(stream, self._path, self._generations)
        try:
            async with asyncio.TaskGroup() as tasks:
                await conversation.read(tasks)
        except* TensorwayError as group:
            conversation.error = _first(group)
        if conversation.error is not None:
            raise conversation.error


class _Part:
    """One request of a stream, to whoever runs it: it has the stream's deadline, and no trailers of its own."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    @property
    def method(self) -> str:
        return self._stream.method

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        return self._stream.metadata

    @property
    def deadline(self) -> Deadline | None:
        return self._stream.deadline

    @property
    def peer(self) -> str:
        return self._stream.peer

    @property
    def peer_names(self) -> tuple[str, ...]:
        return self._stream.peer_names

    @property
    def caller(self) -> object:
        """Who opened the stream, where anybody asked."""
        return getattr(self._stream, "caller", None)

    def set_trailers(self, trailers: Sequence[tuple[str, str | bytes]]) -> None:
        """A stream's trailers would be those of its last request."""

    def on_cancel(self, callback: Callable[[], None]) -> None:
        self._stream.on_cancel(callback)


class _Conversation:
    """One stream."""

    def __init__(self, stream: Stream, path: RequestPath, generations: GenerationPath) -> None:
        self._stream = stream
        self._part = _Part(stream)
        self._path = path
        self._generations = generations
        self._room = asyncio.Semaphore(MAX_RUNNING)
        self._writing = asyncio.Lock()
        self._ends_at_error = str(stream.metadata.get(_STATUS_WISH, "")).lower() == "true"
        #: What ends the stream with a status.
        self.error: TensorwayError | None = None

    async def read(self, tasks: asyncio.TaskGroup) -> None:
        """Begins every request that comes, in a task of `tasks`."""
        #: Set when every response that must come before the next ordered one has been sent.
        turn = asyncio.Event()
        turn.set()
        while (message := await self._stream.read()) is not None:
            arrived_s = time.monotonic()
            await self._room.acquire()
            request = grpc_service_pb2.ModelInferRequest()
            outcome: Callable[[], Awaitable[bytes]]
            try:
                message, lifted = lift_raw_contents(message)
                version, generates = self._parse(message, request)
                request_id = self._path.request_id(request.id)
                if generates:
                    generation = OipGeneration(request, lifted, request_id, arrived_s, version, self._send)
                    tasks.create_task(self._generate(generation, request, version), name="generation of a stream")
                    continue
                outcome = partial(self._infer, read_arrival(request, lifted, request_id, arrived_s), request, version)
            except TensorwayError as error:
                self._path.unread(self._part, len(message), arrived_s, error)
                outcome = partial(self._failed, error, request, request.model_version)
            turn, earlier = asyncio.Event(), turn
            tasks.create_task(self._in_turn(outcome, earlier, turn), name="request of a stream")

    def _parse(self, message: bytes, request: grpc_service_pb2.ModelInferRequest) -> tuple[str, bool]:
        """Fills `request`; returns the version that it means, and whether that one generates."""
        try:
            request.MergeFromString(message)
        except DecodeError as error:
            raise InvalidRequest("the message is no ModelInferRequest", field="request") from error
        try:
            spec = self._generations.find(request.model_name, self._part).find(request.model_version, is_version=True).spec
        except (NotFound, Unavailable, InvalidRequest, PermissionDenied, Unauthenticated):
            # The way of an ordinary request finds the same, and counts it.
            return request.model_version, False
        return spec.version, spec.generation is not None

    async def _in_turn(self, outcome: Callable[[], Awaitable[bytes]], earlier: asyncio.Event, own: asyncio.Event) -> None:
        """Sends the one response of a request after those of the requests before it."""
        try:
            response = await outcome()
            await earlier.wait()
            await self._write(response)
        finally:
            own.set()
            self._room.release()

    async def _infer(self, arrival: Arrival, request: grpc_service_pb2.ModelInferRequest, version: str) -> bytes:
        try:
            answered = await self._path.run(arrival, self._part)
        except TensorwayError as error:
            return await self._failed(error, request, version)
        return _wrapped(write_response(answered, request, is_last_of_stream=True))

    async def _generate(self, generation: OipGeneration, request: grpc_service_pb2.ModelInferRequest, version: str) -> None:
        try:
            await self._generations.run(generation.arrival, self._part, generation)
        except TensorwayError as error:
            await self._write(await self._failed(error, request, version))
        finally:
            self._room.release()

    async def _failed(self, error: TensorwayError, request: grpc_service_pb2.ModelInferRequest, version: str) -> bytes:
        """The response that tells of `error`; raises it where it is to end the stream, or nobody is left to hear of it."""
        if self._ends_at_error or isinstance(error, Cancelled):
            raise error
        response = grpc_service_pb2.ModelInferResponse(model_name=request.model_name, model_version=version, id=request.id)
        response.parameters[FINAL_RESPONSE].bool_param = True
        return grpc_service_pb2.ModelStreamInferResponse(error_message=error.message, infer_response=response).SerializeToString()

    async def _send(self, response: bytes) -> None:
        """A serialised ModelInferResponse."""
        await self._write(_wrapped(response))

    async def _write(self, message: bytes) -> None:
        async with self._writing:
            await self._stream.write(message)


def _wrapped(response: bytes) -> bytes:
    """A serialised ModelStreamInferResponse."""
    return b"".join((_RESPONSE_TAG, varint(len(response)), response))


def _first(group: BaseExceptionGroup[TensorwayError]) -> TensorwayError:
    """One of the errors, however deep."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error

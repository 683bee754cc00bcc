"""`tensorway.v1.InferenceService/Generate`: token streams in the native dialect."""

from __future__ import annotations

import time

from google.protobuf.message import DecodeError

from tensorway.errors import InvalidRequest, TensorwayError
from tensorway.transport.port import Server, Stream
from tensorway.v1 import inference_pb2
from tensorway_gateway.generation_path import GenerationPath
from tensorway_gateway.requests import GenerationArrival, StreamPosition
from tensorway_gateway.servicers.generation_check import check_generate
from tensorway_gateway.servicers.inference import SERVICE


class GenerationServicer:
    """Answers Generate."""

    def __init__(self, path: GenerationPath) -> None:
        self._path = path

    def attach(self, server: Server) -> None:
        server.add_stream(f"/{SERVICE}/Generate", self.generate)

    async def generate(self, stream: Stream) -> None:
        """GenerateRequest bytes in, the bytes of GenerateResponses out as they come."""
        message = await stream.read()
        arrived_s = time.monotonic()
        if message is None:
            raise InvalidRequest("Generate needs exactly one request message", field="request")
        try:
            arrival = self._read(message, arrived_s)
        except TensorwayError as error:
            self._path.unread(stream, len(message), arrived_s, error)
            raise
        await self._path.run(arrival, stream, stream)

    def _read(self, message: bytes, arrived_s: float) -> GenerationArrival:
        try:
            request = inference_pb2.GenerateRequest.FromString(message)
        except DecodeError as error:
            raise InvalidRequest("the message is no GenerateRequest", field="request") from error
        request_id = self._path.request_id(request.request_id)
        check_generate(request)
        resume = StreamPosition(request.resume.stream_id, request.resume.next_sequence) if request.HasField("resume") else None
        return GenerationArrival(
            model=request.model, revision=request.revision, is_version=False, request_id=request_id, message=message,
            num_choices=max(1, request.num_choices), priority=request.priority, timeout_s=None, arrived_s=arrived_s, resume=resume,
        )

"""gRPC-web as a browser sends it, made by hand from its specification (PROTOCOL-WEB.md of gRPC), through the real Envoy."""

from __future__ import annotations

import base64
import re
import struct

import aiohttp
import pytest
from google.rpc import error_details_pb2, status_pb2

from tensorway.v1 import inference_pb2 as pb
from tensorway.v1 import tensor_pb2
from tests.deploy.envoy import Envoy
from tests.deploy.fleet import NUM_TOKENS, Fleet

pytestmark = pytest.mark.asyncio(loop_scope="session")

INFER = "/tensorway.v1.InferenceService/Infer"
GENERATE = "/tensorway.v1.InferenceService/Generate"
PAGE = "http://localhost:3000"
#: First byte of a frame that holds trailers.
TRAILERS = 0x80


def framed(message: bytes) -> bytes:
    return struct.pack(">BI", 0, len(message)) + message


def frames(body: bytes) -> list[tuple[int, bytes]]:
    """(flags, content) of each frame."""
    found = []
    while body:
        flags, size = struct.unpack_from(">BI", body)
        found.append((flags, body[5 : 5 + size]))
        body = body[5 + size :]
    return found


def trailers(content: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in content.decode().split("\r\n") if line)
    return {name.strip().lower(): value.strip() for name, _, value in lines}


def infer(model: str) -> bytes:
    tensor = tensor_pb2.Tensor(name="x", dtype=tensor_pb2.DATA_TYPE_FP32, shape=[1, 1], data=struct.pack("<f", 3))
    return pb.InferRequest(model=model, inputs=[tensor]).SerializeToString()


def from_text(body: bytes) -> bytes:
    """The text form is base64 of pieces one after another, each of which may end in padding."""
    return b"".join(base64.b64decode(piece + b"=" * (-len(piece) % 4)) for piece in re.split(b"=+", body))


async def call(envoy: Envoy, method: str, message: bytes, content_type: str = "application/grpc-web+proto") -> aiohttp.ClientResponse:
    headers = {"content-type": content_type, "accept": content_type, "x-grpc-web": "1", "origin": PAGE}
    body = base64.b64encode(framed(message)) if "text" in content_type else framed(message)
    return await envoy.http.post(f"http://{envoy.endpoint}{method}", data=body, headers=headers)


async def test_the_preflight_of_a_page_is_answered(fleet: Fleet, front: Envoy) -> None:
    asked = {
        "origin": PAGE, "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,x-grpc-web,authorization",
    }
    async with front.http.options(f"http://{front.endpoint}{INFER}", headers=asked) as response:
        assert response.status == 200
        assert response.headers["access-control-allow-origin"] == PAGE
        allowed = {name.strip() for name in response.headers["access-control-allow-headers"].split(",")}
        assert {"content-type", "x-grpc-web", "authorization", "grpc-timeout"} <= allowed
        assert "POST" in response.headers["access-control-allow-methods"]


async def test_a_page_from_elsewhere_is_not(fleet: Fleet, front: Envoy) -> None:
    asked = {"origin": "http://localhost.elsewhere.example", "access-control-request-method": "POST"}
    async with front.http.options(f"http://{front.endpoint}{INFER}", headers=asked) as response:
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("content_type", ["application/grpc-web+proto", "application/grpc-web-text+proto"])
async def test_a_unary_call(fleet: Fleet, front: Envoy, content_type: str) -> None:
    response = await call(front, INFER, infer("identity"), content_type)
    body = await response.read()
    assert response.status == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert "grpc-status" in response.headers["access-control-expose-headers"]
    raw = from_text(body) if "text" in content_type else body
    (flags, message), (end, told) = frames(raw)
    assert (flags, end) == (0, TRAILERS)
    assert struct.unpack("<f", pb.InferResponse.FromString(message).outputs[0].data) == (3,)
    assert trailers(told)["grpc-status"] == "0"
    assert "tensorway-timing" in trailers(told)


async def test_a_stream_arrives_message_by_message(fleet: Fleet, front: Envoy) -> None:
    fleet.go_on.clear()
    message = pb.GenerateRequest(model="slow-talker", text="hello").SerializeToString()
    response = await call(front, GENERATE, message)
    begun = b""
    while len(frames(begun)) < 2 or len(frames(begun)[-1][1]) < struct.unpack_from(">I", begun, len(frames(begun)[0][1]) + 6)[0]:
        begun += await response.content.readany()
    assert pb.GenerateResponse.FromString(frames(begun)[0][1]).WhichOneof("event") == "started"
    fleet.go_on.set()
    *messages, (end, told) = frames(begun + await response.content.read())
    assert len(messages) == NUM_TOKENS + 2
    assert end == TRAILERS
    assert trailers(told)["grpc-status"] == "0"


async def test_an_error_arrives_with_its_details(fleet: Fleet, front: Envoy) -> None:
    response = await call(front, INFER, infer("full"))
    body = await response.read()
    # An answer without messages may hold its trailers in the headers, or in a frame of their own.
    told = {name.lower(): value for name, value in response.headers.items()} | (trailers(frames(body)[-1][1]) if body else {})
    assert told["grpc-status"] == "8"
    details = told["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(base64.b64decode(details + "=" * (-len(details) % 4)))
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToTimedelta().total_seconds() == 1.5

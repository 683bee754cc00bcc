"""ModelStreamInfer over real gRPC on both server implementations; tritonclient itself is in tests/integration/triton_script.py."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from tensorway.compat import grpc_service_pb2 as oip
from tensorway.errors import ModelFailed
from tensorway.tensors import decode_bytes, encode_bytes
from tensorway.transport.port import Exchange
from tensorway.v1 import inference_pb2 as pb
from tensorway.v1 import link_pb2
from tensorway_gateway.servicers.oip_stream import MAX_RUNNING
from tests.contract.gateway.scripted import ECHO, Script, answer, echo_reply, running_mesh
from tests.contract.gateway.streaming import TALKER, Pusher, answer_of, talk

pytestmark = pytest.mark.parametrize("implementation", ["completion-queue", "aio"])
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
SPECS = (TALKER, ECHO)


def echo(id: str, value: float = 1.0, **changes: Any) -> oip.ModelInferRequest:
    fields = {
        "model_name": "echo", "id": id, "inputs": [oip.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 1])],
        "raw_input_contents": [struct.pack("<f", value)],
    }
    return oip.ModelInferRequest(**{**fields, **changes})


def prompt(
    id: str = "g", text: bytes = b"hello", *, shape: tuple[int, ...] = (1,), end: bool = True, **parameters: Any
) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(
        model_name="talker", id=id, inputs=[oip.ModelInferRequest.InferInputTensor(name="text", datatype="BYTES", shape=shape)],
        raw_input_contents=[encode_bytes([text])],
    )
    if end:
        request.parameters["triton_enable_empty_final_response"].bool_param = True
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    for name, value in parameters.items():
        setattr(request.parameters[name], kinds[type(value)], value)
    return request


class Conversation:
    """One stream of a plain gRPC client."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def say(self, *requests: oip.ModelInferRequest) -> None:
        for request in requests:
            await self.call.write(request.SerializeToString())

    async def hear(self) -> oip.ModelStreamInferResponse | None:
        message = await asyncio.wait_for(self.call.read(), 30.0)
        return None if message is grpc.aio.EOF else oip.ModelStreamInferResponse.FromString(message)

    async def rest(self) -> list[oip.ModelStreamInferResponse]:
        """Says that this was all, and hears what is still to come."""
        await self.call.done_writing()
        found = []
        while (response := await self.hear()) is not None:
            found.append(response)
        return found


@asynccontextmanager
async def talking(tmp_path: Path, implementation: str, *scripts: Script, **metadata: str) -> AsyncIterator[tuple[Conversation, Any]]:
    async with (
        running_mesh(tmp_path, implementation=implementation, scripts=scripts, specs=SPECS) as mesh,
        grpc.aio.insecure_channel(mesh.endpoint) as channel,
    ):
        yield Conversation(channel.stream_stream(STREAM)(metadata=tuple(metadata.items()))), mesh


def is_final(response: oip.ModelStreamInferResponse) -> bool:
    return response.infer_response.parameters["triton_final_response"].bool_param


def script_of(num_tokens: int) -> Script:
    """Echoes to those who infer, and talks to those who generate."""

    def script(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        if head.HasField("generate"):
            talk(num_tokens)(exchange, head)
        else:
            exchange.reply(*echo_reply(head, exchange.payload, SPECS))

    return script


async def test_an_ordinary_model_answers_each_request_once(tmp_path: Path, implementation: str) -> None:
    async with talking(tmp_path, implementation, answer) as (stream, _):
        await stream.say(*(echo(f"r{number}", number) for number in range(200)))
        responses = await stream.rest()
        assert [response.infer_response.id for response in responses] == [f"r{number}" for number in range(200)]
        for number, response in enumerate(responses):
            assert response.error_message == ""
            assert response.infer_response.raw_output_contents[0] == struct.pack("<f", number)
            assert (response.infer_response.model_name, response.infer_response.model_version) == ("echo", "1")
            assert is_final(response)


async def test_answers_keep_the_order_of_requests(tmp_path: Path, implementation: str) -> None:
    held: list[tuple[Exchange, link_pb2.RequestHead]] = []
    async with talking(tmp_path, implementation, lambda exchange, head: held.append((exchange, head))) as (stream, mesh):
        await stream.say(*(echo(f"r{number}") for number in range(4)), echo("bad", raw_input_contents=[b""]))
        await mesh.until(lambda: len(held) == 4)
        for exchange, head in reversed(held):
            answer(exchange, head)
        assert [response.infer_response.id for response in await stream.rest()] == ["r0", "r1", "r2", "r3", "bad"]


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
async def test_a_generation_answers_piece_by_piece(tmp_path: Path, implementation: str, shape: tuple[int, ...]) -> None:
    async with talking(tmp_path, implementation, script_of(30)) as (stream, mesh):
        await stream.say(prompt(
            "g1", "schön".encode(), shape=shape, temperature=0.5, top_k=3, top_p=1, seed=9, max_tokens=30, stop="END", ignore_eos=True,
        ))
        responses = await stream.rest()
        *pieces, last = responses
        assert [decode_bytes(piece.infer_response.raw_output_contents[0]) for piece in pieces] == [[b"%d " % token] for token in range(30)]
        assert not any(is_final(piece) for piece in pieces)
        output = pieces[0].infer_response.outputs[0]
        assert (output.name, output.datatype, tuple(output.shape)) == ("text", "BYTES", shape)
        assert {response.infer_response.id for response in responses} == {"g1"}
        assert {response.infer_response.model_version for response in responses} == {"1"}
        assert is_final(last)
        assert not last.infer_response.outputs
        told = last.infer_response.parameters
        assert (told["finish_reason"].string_param, told["num_prompt_tokens"].int64_param) == ("length", 3)
        assert told["num_completion_tokens"].int64_param == 30
        (head,) = mesh.orchestrators[0].heads
        assert head.generate == pb.GenerateRequest(
            model="talker", request_id="g1", text="schön", sampling=pb.Sampling(temperature=0.5, top_k=3, top_p=1, seed=9),
            stop=pb.Stop(max_tokens=30, strings=["END"], ignore_eos=True),
        )


async def test_the_empty_end_comes_only_where_it_is_asked_for(tmp_path: Path, implementation: str) -> None:
    async with talking(tmp_path, implementation, script_of(3)) as (stream, _):
        await stream.say(prompt(end=False))
        responses = await stream.rest()
        assert [bool(response.infer_response.outputs) for response in responses] == [True] * 3
        assert not any(is_final(response) for response in responses)


async def test_generations_and_others_share_a_stream(tmp_path: Path, implementation: str) -> None:
    held: list[Exchange] = []

    def script(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        if head.request_id == "slow":
            held.append(exchange)
        else:
            script_of(20)(exchange, head)

    async with talking(tmp_path, implementation, script) as (stream, _):
        await stream.say(prompt("slow"), *(prompt(f"g{number}") for number in range(10)), echo("e1"), echo("e2"))
        heard: dict[str, list[oip.ModelStreamInferResponse]] = {}
        while sum(is_final(last) for *_, last in heard.values()) < 12:
            response = await stream.hear()
            assert response is not None
            heard.setdefault(response.infer_response.id, []).append(response)
        assert {id: len(found) for id, found in heard.items()} == {**{f"g{number}": 21 for number in range(10)}, "e1": 1, "e2": 1}
        Pusher(held[0], answer_of(2), lambda: held[0].reply(b"", ()))
        assert [response.infer_response.id for response in await stream.rest()] == ["slow"] * 3


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (echo("bad", model_name="nope"), "model 'nope' is unknown here"),
        (echo("bad", model_version="9"), "no revision '9'"),
        (echo("bad", raw_input_contents=[b"\0"]), "input 'x' data: FP32 of shape [1, 1] needs 4 bytes, got 1"),
        (prompt("bad", b"\xff"), "input 'text': is not UTF-8"),
        (prompt("bad", b""), "text: is empty"),
        (prompt("bad", shape=(2,)), "input 'text': must be BYTES of shape [1] or [1, 1], got BYTES of [2]"),
        (prompt("bad", temperature=-1.0), "sampling.temperature: -1 is outside 0 to 100"),
        (prompt("bad", temperature=True), "parameter 'temperature': True does not fit"),
        (prompt("bad", temperature="hot"), "parameter 'temperature': 'hot' does not fit"),
        (prompt("bad", top_k=-1), "parameter 'top_k': -1 does not fit"),
        (prompt("bad", stop=3), "parameter 'stop': 3 does not fit"),
        (prompt("bad", beams=3), "parameter 'beams': is not one of a generation: temperature, "),
        (prompt("bad", timeout=-3), "parameter 'timeout': must be a whole number"),
    ],
)
async def test_an_error_is_told_in_its_response_and_the_stream_goes_on(
    tmp_path: Path, implementation: str, request_: oip.ModelInferRequest, says: str
) -> None:
    async with talking(tmp_path, implementation, script_of(1)) as (stream, mesh):
        await stream.say(request_)
        response = await stream.hear()
        assert response is not None
        assert says in response.error_message
        assert (response.infer_response.id, response.infer_response.model_name) == ("bad", request_.model_name)
        assert is_final(response)
        await stream.say(echo("good"), prompt("fine"))
        heard = await stream.rest()
        assert [response.error_message for response in heard] == [""] * 3
        assert len(mesh.orchestrators[0].heads) == 2
        assert await stream.call.code() is grpc.StatusCode.OK


async def test_bytes_that_are_no_request_are_told_too(tmp_path: Path, implementation: str) -> None:
    async with talking(tmp_path, implementation, script_of(1)) as (stream, _):
        await stream.call.write(b"\xff\xff\xff")
        response = await stream.hear()
        assert response is not None
        assert response.error_message == "the message is no ModelInferRequest"
        await stream.say(echo("good"))
        assert [response.infer_response.id for response in await stream.rest()] == ["good"]


async def test_a_failure_in_mid_answer_is_its_last_response(tmp_path: Path, implementation: str) -> None:
    def script(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        Pusher(exchange, answer_of(3)[:3], lambda: exchange.fail(ModelFailed("lost for words")))

    async with talking(tmp_path, implementation, script) as (stream, _):
        await stream.say(prompt())
        *pieces, last = await stream.rest()
        assert [is_final(piece) for piece in pieces] == [False, False]
        assert (last.error_message, is_final(last), last.infer_response.model_version) == ("lost for words", True, "1")


async def test_a_client_that_wants_a_status_gets_one(tmp_path: Path, implementation: str) -> None:
    async with talking(tmp_path, implementation, script_of(1), triton_grpc_error="true") as (stream, mesh):
        await stream.say(echo("good"))
        assert (await stream.hear()).infer_response.id == "good"  # type: ignore[union-attr]
        await stream.say(echo("bad", model_name="nope"))
        with pytest.raises(grpc.aio.AioRpcError, match="unknown here") as caught:
            await stream.hear()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        value = mesh.context.metrics.get_sample_value
        assert value("tensorway_gateway_requests_total", {"model": "", "code": "NOT_FOUND"}) == 1


async def test_a_client_that_goes_away_cancels_all_its_requests(tmp_path: Path, implementation: str) -> None:
    async with talking(tmp_path, implementation, lambda exchange, head: None) as (stream, mesh):
        await stream.say(*(prompt(f"g{number}") for number in range(3)), echo("e"))
        orchestrator = mesh.orchestrators[0]
        await mesh.until(lambda: len(orchestrator.heads) == 4)
        stream.call.cancel()
        await mesh.until(lambda: orchestrator.num_cancelled == 4)
        await mesh.until(lambda: mesh.context.metrics.get_sample_value("tensorway_gateway_in_flight_requests") == 0)


async def test_requests_at_once_on_one_stream_are_bounded(tmp_path: Path, implementation: str) -> None:
    held: list[Exchange] = []

    def script(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        held.append(exchange)

    async with talking(tmp_path, implementation, script) as (stream, mesh):
        await stream.say(*(prompt(f"g{number}", end=False) for number in range(MAX_RUNNING + 10)))
        await mesh.until(lambda: len(held) == MAX_RUNNING)
        await asyncio.sleep(0.1)
        assert len(held) == MAX_RUNNING
        for number in range(MAX_RUNNING + 10):
            await mesh.until(lambda number=number: len(held) > number)  # type: ignore[misc]
            held[number].reply(b"", ())
        assert await stream.rest() == []

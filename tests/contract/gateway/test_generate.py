"""Generate through the gateway: relay, credit, refusals, and streams that outlive an orchestrator. Both server implementations."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import grpc
import pytest

from tensorway.errors import ModelFailed, NotFound, TensorwayError, Unavailable
from tensorway.transport.port import TOKEN_CREDIT, Exchange
from tensorway.v1 import inference_pb2 as pb
from tensorway.v1 import link_pb2
from tests.contract.gateway.scripted import ECHO, Mesh, Script, ScriptedOrchestrator, running_mesh
from tests.contract.gateway.streaming import (
    TALKER,
    Pusher,
    Reading,
    answer_of,
    delta,
    finished,
    generating,
    request,
    started,
    talk,
    tokens_of,
)

pytestmark = pytest.mark.parametrize("implementation", ["completion-queue", "aio"])
SPECS = (TALKER, ECHO)


def mesh_of(tmp_path: Path, implementation: str, *scripts: Script, **settings: object) -> Any:
    return running_mesh(tmp_path, implementation=implementation, scripts=scripts, specs=SPECS, settings=settings)


def never(exchange: Exchange, head: link_pb2.RequestHead) -> None:
    """Takes the request and keeps it."""


def keep(held: list[Exchange]) -> Script:
    return lambda exchange, head: held.append(exchange)


async def refusal(reading: Reading) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reading.all()
    return caught.value.code(), caught.value.details() or ""


async def test_a_stream_arrives_whole_and_as_it_was_sent(tmp_path: Path, implementation: str) -> None:
    async with mesh_of(tmp_path, implementation, talk(300)) as mesh:
        given = request(request_id="mine", priority=5, sampling=pb.Sampling(seed=9), stop=pb.Stop(max_tokens=300))
        async with generating(mesh.endpoint, given) as reading:
            messages = await reading.all()
            trailers = dict(await reading.call.trailing_metadata())
        assert [message.SerializeToString() for message in messages] == answer_of(300)
        assert trailers["tensorway-request-id"] == "mine"
        assert "tensorway-timing" not in trailers
        (head,) = mesh.orchestrators[0].heads
        assert head.generate == given
        assert (head.model, head.revision, head.request_id, head.priority, head.rows) == ("talker", TALKER.revision, "mine", 5, 1)
        assert not head.so_far
        assert mesh.orchestrators[0].num_cancelled == 0


async def test_each_message_leaves_at_once(tmp_path: Path, implementation: str) -> None:
    held: list[Exchange] = []
    async with mesh_of(tmp_path, implementation, keep(held)) as mesh, generating(mesh.endpoint, request()) as reading:
        await mesh.until(lambda: bool(held))
        for message in answer_of(40):
            await mesh.until(lambda: held[0].credit > 0)
            held[0].push(message)
            # Read before the next is sent: nothing waits for company.
            assert (await reading.next()).SerializeToString() == message  # type: ignore[union-attr]
        held[0].reply(b"", ())
        assert await reading.next() is None


async def test_many_streams_do_not_mix(tmp_path: Path, implementation: str) -> None:
    async with mesh_of(tmp_path, implementation, talk(50)) as mesh, grpc.aio.insecure_channel(mesh.endpoint) as channel:
        method = channel.unary_stream("/tensorway.v1.InferenceService/Generate")
        streams = [Reading(method(request(request_id=f"r{number}").SerializeToString())) for number in range(64)]
        for messages in await asyncio.gather(*(stream.all() for stream in streams)):
            assert tokens_of(messages) == list(range(50))
        assert _metric(mesh, "tensorway_gateway_in_flight_requests") == 0


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"text": ""}, "text"),
        ({"token_ids": pb.TokenIds()}, "token_ids.ids"),
        ({"chat": pb.Chat()}, "chat.messages"),
        ({"chat": pb.Chat(messages=[pb.ChatMessage(role="user"), pb.ChatMessage(content="x")])}, "chat.messages[1].role"),
        ({"priority": 101}, "priority"),
        ({"num_choices": 65}, "num_choices"),
        ({"num_top_logprobs": 21}, "num_top_logprobs"),
        ({"request_id": "i" * 513}, "request_id"),
        ({"sampling": pb.Sampling(temperature=-1)}, "sampling.temperature"),
        ({"sampling": pb.Sampling(temperature=math.nan)}, "sampling.temperature"),
        ({"sampling": pb.Sampling(temperature=101)}, "sampling.temperature"),
        ({"sampling": pb.Sampling(top_p=0)}, "sampling.top_p"),
        ({"sampling": pb.Sampling(top_p=1.1)}, "sampling.top_p"),
        ({"sampling": pb.Sampling(min_p=-0.1)}, "sampling.min_p"),
        ({"sampling": pb.Sampling(repetition_penalty=0)}, "sampling.repetition_penalty"),
        ({"sampling": pb.Sampling(repetition_penalty=math.inf)}, "sampling.repetition_penalty"),
        ({"stop": pb.Stop(max_tokens=0)}, "stop.max_tokens"),
        ({"stop": pb.Stop(max_tokens=3, min_tokens=4)}, "stop.min_tokens"),
        ({"stop": pb.Stop(strings=["x"] * 17)}, "stop.strings"),
        ({"stop": pb.Stop(strings=["x", ""])}, "stop.strings[1]"),
        ({"stop": pb.Stop(strings=["x" * 257])}, "stop.strings[0]"),
        ({"stop": pb.Stop(token_ids=range(65))}, "stop.token_ids"),
        ({"resume": pb.Resume(stream_id="s"), "model": "", "echo": True}, "echo"),
        ({"resume": pb.Resume(stream_id="s")}, "model"),
        ({"resume": pb.Resume(), "model": ""}, "resume.stream_id"),
    ],
)
async def test_what_is_out_of_place_is_named(tmp_path: Path, implementation: str, fields: dict[str, Any], field: str) -> None:
    async with mesh_of(tmp_path, implementation, talk(1)) as mesh, generating(mesh.endpoint, request(**fields)) as reading:
        code, says = await refusal(reading)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert says.startswith(f"{field}: ")
        assert mesh.orchestrators[0].heads == []


async def test_the_bounds_themselves_are_taken(tmp_path: Path, implementation: str) -> None:
    widest = request(
        num_choices=1, num_top_logprobs=20, priority=-100, chat=pb.Chat(messages=[pb.ChatMessage(role="user")]),
        sampling=pb.Sampling(temperature=100, top_p=1, min_p=1, repetition_penalty=100, top_k=0, seed=2**64 - 1),
        stop=pb.Stop(strings=["x" * 256] * 16, token_ids=range(64), min_tokens=4, max_tokens=4),
    )
    async with mesh_of(tmp_path, implementation, talk(4)) as mesh, generating(mesh.endpoint, widest) as reading:
        assert tokens_of(await reading.all()) == [0, 1, 2, 3]
        assert mesh.orchestrators[0].heads[0].generate == widest


async def test_models_that_do_not_generate_or_are_not_known(tmp_path: Path, implementation: str) -> None:
    async with mesh_of(tmp_path, implementation, talk(1)) as mesh:
        for message, code, says in (
            (request(model="echo"), grpc.StatusCode.FAILED_PRECONDITION, "model 'echo' does not generate; use Infer"),
            (request(model="nope"), grpc.StatusCode.NOT_FOUND, "model 'nope' is unknown here; models known: echo, talker"),
            (request(revision="f" * 12), grpc.StatusCode.NOT_FOUND, "has no revision 'ffffffffffff'"),
            (pb.GenerateRequest(model="talker"), grpc.StatusCode.INVALID_ARGUMENT, "set one of text, token_ids, chat and resume"),
        ):
            async with generating(mesh.endpoint, message) as reading:
                found, sentence = await refusal(reading)
                assert found is code
                assert says in sentence
        async with grpc.aio.insecure_channel(mesh.endpoint) as channel:
            method = "/tensorway.v1.InferenceService/Generate"
            assert (await refusal(Reading(channel.unary_stream(method)(b"\xff\xff"))))[0] is grpc.StatusCode.INVALID_ARGUMENT
            silent = channel.stream_stream(method)()
            await silent.done_writing()
            assert await silent.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert mesh.orchestrators[0].heads == []
        value = mesh.context.metrics.get_sample_value
        assert value("tensorway_gateway_requests_total", {"model": "echo", "code": "FAILED_PRECONDITION"}) == 1
        assert value("tensorway_gateway_requests_total", {"model": "", "code": "NOT_FOUND"}) == 1


async def test_an_error_comes_after_what_was_sent(tmp_path: Path, implementation: str) -> None:
    def script(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        Pusher(exchange, [started(), delta(1, 0)], lambda: exchange.fail(ModelFailed("lost for words")))

    async with mesh_of(tmp_path, implementation, script) as mesh, generating(mesh.endpoint, request()) as reading:
        assert (await reading.next()).HasField("started")  # type: ignore[union-attr]
        assert (await reading.next()).HasField("delta")  # type: ignore[union-attr]
        code, says = await refusal(reading)
        assert (code, says) == (grpc.StatusCode.INTERNAL, "lost for words")
        assert len(mesh.orchestrators[0].heads) == 1


@pytest.mark.parametrize("num_read", [0, 1, 5])
@pytest.mark.parametrize("vanishes", [False, True])
async def test_a_client_that_goes_away_cancels_at_the_orchestrator(
    tmp_path: Path, implementation: str, num_read: int, vanishes: bool
) -> None:
    async with mesh_of(tmp_path, implementation, talk(1_000_000) if num_read else never) as mesh:
        orchestrator = mesh.orchestrators[0]
        async with generating(mesh.endpoint, request()) as reading:
            for _ in range(num_read):
                await reading.next()
            await orchestrator.arrived.wait()
            if not vanishes:
                reading.call.cancel()
                await asyncio.wait_for(orchestrator.cancelled.wait(), 5.0)
        await asyncio.wait_for(orchestrator.cancelled.wait(), 5.0)
        assert orchestrator.num_cancelled == 1
        await mesh.until(lambda: _metric(mesh, "tensorway_gateway_in_flight_requests") == 0)


async def test_the_clients_deadline_ends_the_stream_everywhere(tmp_path: Path, implementation: str) -> None:
    seen: list[float] = []

    def script(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        seen.append(exchange.deadline.remaining_s())
        exchange.push(started())

    async with mesh_of(tmp_path, implementation, script) as mesh, generating(mesh.endpoint, request(), timeout_s=0.5) as reading:
        assert (await refusal(reading))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(mesh.orchestrators[0].cancelled.wait(), 5.0)
        assert 0 < seen[0] <= 0.51


async def test_the_gateways_own_limit_names_the_hop(tmp_path: Path, implementation: str) -> None:
    async with mesh_of(tmp_path, implementation, never, max_timeout_s=0.2) as mesh, generating(mesh.endpoint, request()) as reading:
        code, says = await refusal(reading)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "while the answer was being generated; 0 messages were sent" in says
        await asyncio.wait_for(mesh.orchestrators[0].cancelled.wait(), 5.0)


async def test_a_client_that_does_not_read_holds_up_nobody_and_is_cut_off_at_its_deadline(tmp_path: Path, implementation: str) -> None:
    num_pushed = 0

    def script(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        if head.request_id != "slow":
            talk(500)(exchange, head)
            return

        def push() -> None:
            nonlocal num_pushed
            while exchange.credit:
                exchange.push(delta(num_pushed, 1, text="x" * 60_000))
                num_pushed += 1

        exchange.on_credit(push)
        push()

    async with (
        mesh_of(tmp_path, implementation, script, max_timeout_s=4.0) as mesh,
        generating(mesh.endpoint, request(request_id="slow"), None) as slow,
    ):
        await mesh.until(lambda: num_pushed >= TOKEN_CREDIT)
        # What the slow client does not take is held back by its credit, not piled up, while others run freely.
        for _ in range(3):
            async with generating(mesh.endpoint, request()) as quick:
                assert tokens_of(await quick.all()) == list(range(500))
        await asyncio.sleep(0.3)
        held_back = num_pushed
        await asyncio.sleep(0.3)
        assert num_pushed == held_back < 500
        await asyncio.wait_for(mesh.orchestrators[0].cancelled.wait(), 10.0)
        code, says = await refusal(slow)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "the client had not taken" in says


async def test_more_streams_than_fit_are_refused(tmp_path: Path, implementation: str) -> None:
    async with mesh_of(tmp_path, implementation, never, max_in_flight_requests=1) as mesh, generating(mesh.endpoint, request()) as reading:
        first = asyncio.ensure_future(reading.next())
        await mesh.orchestrators[0].arrived.wait()
        async with generating(mesh.endpoint, request()) as second:
            assert (await refusal(second))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()


async def test_metrics_of_streams(tmp_path: Path, implementation: str) -> None:
    async with mesh_of(tmp_path, implementation, talk(5)) as mesh:
        for _ in range(2):
            async with generating(mesh.endpoint, request()) as reading:
                await reading.all()
        value = mesh.context.metrics.get_sample_value
        await mesh.until(lambda: value("tensorway_gateway_requests_total", {"model": "talker", "code": "OK"}) == 2)
        assert value("tensorway_gateway_stream_messages_total", {"model": "talker"}) == 14
        assert value("tensorway_gateway_first_delta_seconds_count", {"model": "talker"}) == 2
        assert value("tensorway_gateway_stream_messages_total", {"model": "echo"}) is None


# --- orchestrators that are lost


@pytest.mark.parametrize("num_before", [0, 1, 2, 9, 30])
async def test_a_stream_goes_on_at_another_orchestrator(tmp_path: Path, implementation: str, num_before: int) -> None:
    """`num_before` messages are on their way when the first orchestrator dies."""

    def dying(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        Pusher(exchange, answer_of(30)[:num_before], lambda: None)

    async with mesh_of(tmp_path, implementation, dying, dying) as mesh, generating(mesh.endpoint, request()) as reading:
        messages = []
        for _ in range(num_before):
            messages.append(await reading.next())
        await mesh.until(lambda: any(orchestrator.heads for orchestrator in mesh.orchestrators))
        chosen, other = sorted(mesh.orchestrators, key=lambda orchestrator: not orchestrator.heads)
        other.script = talk(30)
        await chosen.stop()
        messages += await reading.all()
        assert [message.SerializeToString() for message in messages if message] == answer_of(30)
        (head,) = other.heads
        assert head.next_sequence == num_before
        assert bool(head.so_far) is bool(num_before)
        assert head.generate == request()


async def test_a_stream_survives_every_orchestrator_in_turn(tmp_path: Path, implementation: str) -> None:
    """Each says a bit and then that it drains; with each bit the others may be asked again."""
    num_heads = 0

    def stutter(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        nonlocal num_heads
        num_heads += 1
        part = answer_of(30)[head.next_sequence :][:3]
        is_last = head.next_sequence + len(part) == 32
        Pusher(exchange, part, lambda: exchange.reply(b"", ()) if is_last else exchange.fail(Unavailable("draining")))

    async with mesh_of(tmp_path, implementation, stutter, stutter) as mesh, generating(mesh.endpoint, request()) as reading:
        assert [message.SerializeToString() for message in await reading.all()] == answer_of(30)
        assert num_heads == 11


async def test_choices_and_prompts_are_told_to_the_next_orchestrator(tmp_path: Path, implementation: str) -> None:
    prompt = pb.GenerateResponse(sequence=1, delta=pb.Delta(choice=1, text="hello", token_ids=[500, 501], is_prompt=True))
    begun = [
        started(revision="ab" * 32), prompt.SerializeToString(), delta(2, 7, 0, 1), delta(3, 8, 0, 0), finished(4, 1, 0), delta(5, 9, 1, 1),
    ]
    seen: list[link_pb2.RequestHead] = []

    def script(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        seen.append(head)
        if len(seen) == 1:
            Pusher(exchange, list(begun), lambda: exchange.fail(Unavailable("draining")))
        else:
            Pusher(exchange, [finished(6, 2, 1), finished(7, 0, 2)], lambda: exchange.reply(b"", ()))

    asked = request(num_choices=3, echo=True)
    async with mesh_of(tmp_path, implementation, script, script) as mesh, generating(mesh.endpoint, asked) as reading:
        assert [message.sequence for message in await reading.all()] == list(range(8))
    head = seen[1]
    assert [(list(item.token_ids), item.has_prompt, item.is_finished) for item in head.so_far] == [
        ([8], False, True), ([7, 9], True, False), ([], False, False),
    ]
    # The revision that began goes on, whatever serves by now.
    assert (head.stream_id, head.next_sequence, head.seed, head.revision) == ("stream-1", 6, 77, "ab" * 32)


async def test_an_answer_that_lacks_only_its_end_is_whole(tmp_path: Path, implementation: str) -> None:
    def script(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        Pusher(exchange, answer_of(3), lambda: exchange.fail(Unavailable("gone before it said that this was all")))

    async with mesh_of(tmp_path, implementation, script, script) as mesh, generating(mesh.endpoint, request()) as reading:
        assert len(await reading.all()) == 5
        assert sum(len(orchestrator.heads) for orchestrator in mesh.orchestrators) == 1


async def test_when_nobody_goes_on_the_last_refusal_is_told(tmp_path: Path, implementation: str) -> None:
    def script(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        messages = [] if head.so_far else [started()]
        Pusher(exchange, messages, lambda: exchange.fail(Unavailable("no group is left")))

    async with mesh_of(tmp_path, implementation, script, script) as mesh, generating(mesh.endpoint, request()) as reading:
        assert await refusal(reading) == (grpc.StatusCode.UNAVAILABLE, "no group is left")
        assert sorted(len(orchestrator.heads) for orchestrator in mesh.orchestrators) == [1, 2]


async def test_a_stream_waits_for_an_orchestrator_to_come(tmp_path: Path, implementation: str) -> None:
    def dying(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        Pusher(exchange, answer_of(10)[:4], lambda: None)

    successor = ScriptedOrchestrator("successor", talk(10))
    async with mesh_of(tmp_path, implementation, dying) as mesh, generating(mesh.endpoint, request()) as reading:
        messages = [await reading.next() for _ in range(4)]
        await mesh.orchestrators[0].stop()
        await mesh.until(lambda: not mesh.is_ready)
        try:
            await successor.start(mesh.registry, implementation)
            messages += await reading.all()
        finally:
            await successor.stop()
        assert tokens_of([message for message in messages if message]) == list(range(10))


# --- resume


def knows(stream_id: str, num_tokens: int, error: TensorwayError | None = None) -> Script:
    def script(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        resume = head.generate.resume
        if error is not None:
            exchange.fail(error)
        elif resume.stream_id == stream_id:
            Pusher(exchange, answer_of(num_tokens)[resume.next_sequence :], lambda: exchange.reply(b"", ()))
        else:
            exchange.fail(NotFound("not mine"))

    return script


def resumption(next_sequence: int = 4, stream_id: str = "stream-1") -> pb.GenerateRequest:
    return request(model="", resume=pb.Resume(stream_id=stream_id, next_sequence=next_sequence), request_id="again")


async def test_a_resumed_stream_is_found_wherever_it_is(tmp_path: Path, implementation: str) -> None:
    scripts = (knows("other", 9), knows("stream-1", 9), knows("third", 9))
    async with mesh_of(tmp_path, implementation, *scripts) as mesh, generating(mesh.endpoint, resumption()) as reading:
        assert [message.SerializeToString() for message in await reading.all()] == answer_of(9)[4:]
        (head,) = mesh.orchestrators[1].heads
        assert (head.model, head.revision, head.request_id) == ("", "", "again")
        assert head.generate == resumption()
        assert not head.so_far
        assert _metric(mesh, "tensorway_gateway_in_flight_requests") == 0


async def test_a_stream_that_nobody_knows_is_not_found(tmp_path: Path, implementation: str) -> None:
    async with mesh_of(tmp_path, implementation, knows("other", 9), knows("third", 9)) as mesh:
        async with generating(mesh.endpoint, resumption()) as reading:
            code, says = await refusal(reading)
        assert code is grpc.StatusCode.NOT_FOUND
        assert "stream 'stream-1' is not known here" in says
        assert [len(orchestrator.heads) for orchestrator in mesh.orchestrators] == [1, 1]


async def test_one_that_could_not_be_asked_may_have_known_it(tmp_path: Path, implementation: str) -> None:
    scripts = (knows("other", 9), knows("stream-1", 9, Unavailable("draining")))
    async with mesh_of(tmp_path, implementation, *scripts) as mesh, generating(mesh.endpoint, resumption()) as reading:
        assert await refusal(reading) == (grpc.StatusCode.UNAVAILABLE, "draining")


async def test_a_resumed_stream_that_is_lost_again_is_sought_again(tmp_path: Path, implementation: str) -> None:
    sequences: list[int] = []

    def script(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        at = head.generate.resume.next_sequence
        sequences.append(at)
        rest = answer_of(9)[at:]
        if len(rest) > 3:
            Pusher(exchange, rest[:3], lambda: exchange.fail(Unavailable("moved")))
        else:
            Pusher(exchange, rest, lambda: exchange.reply(b"", ()))

    async with mesh_of(tmp_path, implementation, script) as mesh, generating(mesh.endpoint, resumption()) as reading:
        assert [message.SerializeToString() for message in await reading.all()] == answer_of(9)[4:]
        assert sequences == [4, 7, 10]


def _metric(mesh: Mesh, name: str) -> float | None:
    return mesh.context.metrics.get_sample_value(name)

"""The Python client's generations through real gateways, one of which goes away in mid-stream."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tensorway import AsyncClient, Delta, Finished, Started
from tensorway.errors import FailedPrecondition, NotFound, Unavailable
from tensorway.transport.port import Exchange
from tensorway.v1 import link_pb2
from tests.contract.gateway.scripted import ECHO, running_mesh
from tests.contract.gateway.streaming import TALKER, Pusher, answer_of, talk

pytestmark = pytest.mark.parametrize("implementation", ["completion-queue", "aio"])
NUM_TOKENS = 12


async def test_a_generation_through_a_gateway(tmp_path: Path, implementation: str) -> None:
    mesh_ = running_mesh(tmp_path, implementation=implementation, scripts=(talk(NUM_TOKENS),), specs=(TALKER, ECHO))
    async with mesh_ as mesh, AsyncClient(mesh.endpoint) as client:
        events = [event async for event in client.generate("talker", [{"role": "user", "content": "count"}], max_tokens=NUM_TOKENS)]
        first, *deltas, last = events
        assert isinstance(first, Started)
        assert [delta.token_ids for delta in deltas if isinstance(delta, Delta)] == [(token,) for token in range(NUM_TOKENS)]
        assert isinstance(last, Finished)
        assert (last.reason, last.num_completion_tokens) == ("length", NUM_TOKENS)
        with pytest.raises(FailedPrecondition, match="does not generate") as caught:
            await anext(client.generate("echo", "x"))
        assert caught.value.field == "model"


def resuming(exchange: Exchange, head: link_pb2.RequestHead) -> None:
    """Knows the stream that another gateway's orchestrator began."""
    if head.generate.WhichOneof("prompt") != "resume":
        exchange.fail(NotFound("only resumes here"))
        return
    Pusher(exchange, answer_of(NUM_TOKENS)[head.generate.resume.next_sequence :], lambda: exchange.reply(b"", ()))


@pytest.mark.parametrize("num_before", [1, 2, 7])
async def test_a_gateway_that_goes_away_is_not_noticed(tmp_path: Path, implementation: str, num_before: int) -> None:
    def beginning(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        Pusher(exchange, answer_of(NUM_TOKENS)[:num_before], lambda: None)

    async with (
        running_mesh(tmp_path / "a", implementation=implementation, scripts=(beginning,), specs=(TALKER,)) as first,
        running_mesh(tmp_path / "b", implementation=implementation, scripts=(resuming,), specs=(TALKER,)) as second,
        # Two addresses of one name, as a resolver or a load balancer gives them.
        AsyncClient(f"ipv4:{first.endpoint},{second.endpoint}") as client,
    ):
        events = client.generate("talker", "count", request_id="mine")
        heard = [await anext(events) for _ in range(num_before)]
        await first.context.server.stop(0.0)
        await asyncio.wait_for(first.orchestrators[0].cancelled.wait(), 10.0)
        heard += [event async for event in events]
        assert [token for event in heard if isinstance(event, Delta) for token in event.token_ids] == list(range(NUM_TOKENS))
        assert isinstance(heard[-1], Finished)
        (head,) = second.orchestrators[0].heads
        assert (head.request_id, head.generate.resume.next_sequence) == ("mine", num_before)


async def test_a_stream_that_no_gateway_can_go_on_with_tells_what_broke_it(tmp_path: Path, implementation: str) -> None:
    def beginning(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        Pusher(exchange, answer_of(NUM_TOKENS)[:3], lambda: None)

    def forgetting(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        exchange.fail(NotFound("kept no longer"))

    async with (
        running_mesh(tmp_path / "a", implementation=implementation, scripts=(beginning,), specs=(TALKER,)) as first,
        running_mesh(tmp_path / "b", implementation=implementation, scripts=(forgetting,), specs=(TALKER,)) as second,
        AsyncClient(f"ipv4:{first.endpoint},{second.endpoint}") as client,
    ):
        events = client.generate("talker", "count")
        for _ in range(3):
            await anext(events)
        await first.context.server.stop(0.0)
        with pytest.raises(Unavailable, match="stopped"):
            await anext(events)
        assert len(second.orchestrators[0].heads) == 1

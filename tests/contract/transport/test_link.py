"""Links over real sockets, accepted by both server implementations."""

from __future__ import annotations

import asyncio
import os
import random

import pytest

from tensorway.deadline import Deadline
from tensorway.errors import DeadlineExceeded, InvalidRequest, Overloaded, TensorwayError, Unavailable
from tensorway.transport import LinkServer, create_link_client
from tensorway.transport.frames import CHUNK_BYTES
from tensorway.transport.port import Exchange, LinkClient

from .conftest import IMPLEMENTATIONS, LOCAL, TIMEOUT_S, Rig, soon
from .links import Peer, Sink, in_time, joined, linked

pytestmark = pytest.mark.parametrize("rig", [*IMPLEMENTATIONS, LOCAL], indirect=True)


async def test_many_requests_of_many_sizes_come_back_equal(rig: Rig) -> None:
    sizes = random.Random(4)
    body = os.urandom(5 << 20)

    async def exchange(link: LinkClient, number: int) -> None:
        size = sizes.choice((0, 1, 4096, CHUNK_BYTES, CHUNK_BYTES + 1, sizes.randrange(5 << 20)))
        cut = sizes.randrange(size + 1)
        payload = (memoryview(body)[:cut], body[cut:size])
        reply = await link.call(b"head %d" % number, payload, in_time())
        assert reply.head == b"head %d" % number
        assert joined(reply.payload) == body[:size]

    async with linked(await Peer(rig, echoes=True).start()) as link:
        await asyncio.gather(*(exchange(link, number) for number in range(120)))
        assert link.num_in_flight == 0


async def test_requests_deadlines_and_errors_cross(rig: Rig) -> None:
    peer = Peer(rig, echoes=False)
    async with linked(await peer.start()) as link:
        sink = Sink()
        link.send(b"head", (b"one", b"two"), Deadline.after(100.0), sink)
        exchange = await asyncio.wait_for(peer.exchanges.get(), TIMEOUT_S)
        assert exchange.head == b"head"
        assert joined(exchange.payload) == b"onetwo"
        assert 50.0 < exchange.deadline.remaining_s() <= 100.0
        exchange.fail(Overloaded("full", field="inputs", hop="leader", retry_after_s=0.5))
        exchange.reply(b"too late", ())
        with pytest.raises(Overloaded, match="full") as raised:
            await soon(sink.outcome)
        assert (raised.value.field, raised.value.hop, raised.value.retry_after_s) == ("inputs", "leader", 0.5)
        assert link.num_in_flight == 0


async def test_a_cancel_reaches_the_exchange_and_silences_the_sink(rig: Rig) -> None:
    peer = Peer(rig, echoes=False)
    async with linked(await peer.start()) as link:
        sink, cancelled = Sink(), asyncio.Event()
        id = link.send(b"", (b"x",), in_time(), sink)
        exchange = await asyncio.wait_for(peer.exchanges.get(), TIMEOUT_S)
        exchange.on_cancel(cancelled.set)
        link.cancel(id)
        link.cancel(id)
        link.cancel(999)
        await soon(cancelled.wait())
        exchange.reply(b"late", (b"late",))
        late = asyncio.Event()
        exchange.on_cancel(late.set)
        await soon(late.wait())
        assert peer.links.num_open == 0
        # The link works on, and the late reply did not reach the sink.
        call = asyncio.ensure_future(link.call(b"next", (), in_time()))
        (await asyncio.wait_for(peer.exchanges.get(), TIMEOUT_S)).reply(b"fine", ())
        assert (await call).head == b"fine"
        assert not sink.outcome.done()


async def test_a_cancel_in_the_middle_of_a_large_payload(rig: Rig) -> None:
    peer = Peer(rig, echoes=True)
    async with linked(await peer.start()) as link:
        for _ in range(10):
            ids = [link.send(b"", (bytes(20 << 20),), in_time(), Sink()) for _ in range(2)]
            assert (await link.call(b"beside", (b"x",), in_time())).head == b"beside"
            for id in ids:
                link.cancel(id)
        assert (await link.call(b"after", (), in_time())).head == b"after"
        assert link.num_in_flight == 0


async def test_a_call_that_is_cancelled_or_late_cancels_at_the_peer(rig: Rig) -> None:
    peer = Peer(rig, echoes=False)
    async with linked(await peer.start()) as link:
        for timeout_s in (TIMEOUT_S, 0.2):
            cancelled = asyncio.Event()
            call = asyncio.ensure_future(link.call(b"", (), Deadline.after(timeout_s)))
            (await asyncio.wait_for(peer.exchanges.get(), TIMEOUT_S)).on_cancel(cancelled.set)
            if timeout_s == TIMEOUT_S:
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
            else:
                with pytest.raises(DeadlineExceeded):
                    await call
            await soon(cancelled.wait())
        assert link.num_in_flight == 0


async def test_drain_lets_open_exchanges_end_and_refuses_new_ones(rig: Rig) -> None:
    peer, changed = Peer(rig, echoes=False), asyncio.Event()
    endpoint = await peer.start()
    async with linked(endpoint):
        # A link that has ended before is no reason to take the drain for done.
        pass
    async with linked(endpoint, on_change=changed.set) as link:
        changed.clear()
        held = asyncio.ensure_future(link.call(b"held", (), in_time()))
        exchange = await asyncio.wait_for(peer.exchanges.get(), TIMEOUT_S)
        draining = asyncio.ensure_future(peer.links.drain(in_time()))
        await soon(changed.wait())
        assert not link.is_connected
        with pytest.raises(Unavailable, match="draining"):
            link.send(b"new", (), in_time(), Sink())
        assert not draining.done()
        exchange.reply(b"done", ())
        assert (await held).head == b"done"
        assert await asyncio.wait_for(draining, TIMEOUT_S) == 0


async def test_a_drain_that_runs_out_of_time_says_what_is_open(rig: Rig) -> None:
    peer = Peer(rig, echoes=False)
    async with linked(await peer.start()) as link:
        held = asyncio.ensure_future(link.call(b"held", (), in_time()))
        await asyncio.wait_for(peer.exchanges.get(), TIMEOUT_S)
        assert await peer.links.drain(Deadline.after(0.05)) == 1
        await peer.stop()
        with pytest.raises(Unavailable):
            await held


async def test_a_stopped_server_fails_what_is_in_flight_and_is_found_again(rig: Rig) -> None:
    peer = Peer(rig, echoes=False)
    endpoint = await peer.start()
    async with linked(endpoint) as link:
        sinks = [Sink() for _ in range(5)]
        for sink in sinks:
            link.send(b"", (b"x",), in_time(), sink)
        cancelled = asyncio.Event()
        (await asyncio.wait_for(peer.exchanges.get(), TIMEOUT_S)).on_cancel(cancelled.set)
        await peer.stop()
        for sink in sinks:
            with pytest.raises(Unavailable, match="broke"):
                await soon(sink.outcome)
        assert cancelled.is_set()
        assert not link.is_connected
        with pytest.raises(Unavailable, match=endpoint):
            await link.wait_connected(Deadline.after(0.05))
        await Peer(rig, echoes=True).start(endpoint)
        await link.wait_connected(in_time())
        assert (await link.call(b"again", (), in_time())).head == b"again"


async def test_a_handler_that_raises_answers_its_exchange(rig: Rig) -> None:
    def crash(exchange: Exchange) -> None:
        raise InvalidRequest("bad head") if exchange.head else KeyError("bug")

    endpoint = await rig.serve(prepare=LinkServer(crash).attach)
    async with linked(endpoint) as link:
        with pytest.raises(InvalidRequest, match="bad head"):
            await link.call(b"x", (), in_time())
        with pytest.raises(TensorwayError, match="KeyError"):
            await link.call(b"", (), in_time())


async def test_changes_of_the_connection_are_told(rig: Rig) -> None:
    states: list[bool] = []
    peer = Peer(rig, echoes=True)
    client = create_link_client(await peer.start(), on_change=lambda: states.append(client.is_connected))
    assert not client.is_connected
    with pytest.raises(Unavailable, match="not been tried"):
        client.send(b"", (), in_time(), Sink())
    running = asyncio.ensure_future(client.run())
    await client.wait_connected(in_time())
    sink = Sink()
    running.cancel()
    client.send(b"", (), in_time(), sink)
    with pytest.raises(asyncio.CancelledError):
        await running
    with pytest.raises(Unavailable, match="closed on this side"):
        await soon(sink.outcome)
    assert states == [True, False]

"""Links over real sockets, accepted by both server implementations."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator

import grpc
import pytest

from tensorway.deadline import Deadline
from tensorway.errors import Cancelled, DeadlineExceeded, InvalidRequest, MessageTooLarge, Overloaded, TensorwayError, Unavailable
from tensorway.transport import LinkServer, create_link_client
from tensorway.transport.frames import CHUNK, CHUNK_BYTES, CREDIT, HEADER, MORE, REQUEST, RESPONSE, TOKEN, decode_message, message_prefix
from tensorway.transport.link_server import MAX_WAITING_BYTES, OPEN
from tensorway.transport.port import Exchange, LinkClient, Payload, ServerOptions

from .conftest import TIMEOUT_S, Rig, soon

LIMIT = 32 << 20


class Peer:
    """An accepting side whose exchanges the test answers, or which echoes."""

    def __init__(self, rig: Rig, echoes: bool, max_message_bytes: int = LIMIT) -> None:
        self.rig = rig
        self.exchanges: asyncio.Queue[Exchange] = asyncio.Queue()
        self.links = LinkServer(_echo if echoes else self.exchanges.put_nowait, max_message_bytes)

    async def start(self, endpoint: str = "127.0.0.1:0") -> str:
        return await self.rig.serve(endpoint=endpoint, max_message_bytes=LIMIT, prepare=self.links.attach)


def _echo(exchange: Exchange) -> None:
    exchange.reply(exchange.head, exchange.payload)


@contextlib.asynccontextmanager
async def linked(endpoint: str, max_message_bytes: int = LIMIT) -> AsyncIterator[LinkClient]:
    client = create_link_client(endpoint, max_message_bytes)
    running = asyncio.ensure_future(client.run())
    try:
        await client.wait_connected(Deadline.after(TIMEOUT_S))
        yield client
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


def _deadline() -> Deadline:
    return Deadline.after(TIMEOUT_S)


def _joined(payload: Payload) -> bytes:
    return b"".join(payload)


class Sink:
    """Remembers the outcome of one request."""

    def __init__(self) -> None:
        self.outcome: asyncio.Future[tuple[bytes, Payload]] = asyncio.get_running_loop().create_future()

    def on_reply(self, head: bytes, payload: Payload) -> None:
        self.outcome.set_result((head, payload))

    def on_error(self, error: TensorwayError) -> None:
        self.outcome.set_exception(error)


async def test_many_requests_of_many_sizes_come_back_equal(rig: Rig) -> None:
    sizes = random.Random(4)
    body = os.urandom(5 << 20)

    async def exchange(link: LinkClient, number: int) -> None:
        size = sizes.choice((0, 1, 4096, CHUNK_BYTES, CHUNK_BYTES + 1, sizes.randrange(5 << 20)))
        cut = sizes.randrange(size + 1)
        payload = (memoryview(body)[:cut], body[cut:size])
        reply = await link.call(b"head %d" % number, payload, _deadline())
        assert reply.head == b"head %d" % number
        assert _joined(reply.payload) == body[:size]

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
        assert _joined(exchange.payload) == b"onetwo"
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
        id = link.send(b"", (b"x",), _deadline(), sink)
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
        call = asyncio.ensure_future(link.call(b"next", (), _deadline()))
        (await asyncio.wait_for(peer.exchanges.get(), TIMEOUT_S)).reply(b"fine", ())
        assert (await call).head == b"fine"
        assert not sink.outcome.done()


async def test_a_cancel_in_the_middle_of_a_large_payload(rig: Rig) -> None:
    peer = Peer(rig, echoes=True)
    async with linked(await peer.start()) as link:
        for _ in range(10):
            ids = [link.send(b"", (bytes(20 << 20),), _deadline(), Sink()) for _ in range(2)]
            assert (await link.call(b"beside", (b"x",), _deadline())).head == b"beside"
            for id in ids:
                link.cancel(id)
        assert (await link.call(b"after", (), _deadline())).head == b"after"
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
    peer = Peer(rig, echoes=False)
    async with linked(await peer.start()) as link:
        held = asyncio.ensure_future(link.call(b"held", (), _deadline()))
        exchange = await asyncio.wait_for(peer.exchanges.get(), TIMEOUT_S)
        draining = asyncio.ensure_future(peer.links.drain(_deadline()))
        while link.is_connected:
            await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="draining"):
            link.send(b"new", (), _deadline(), Sink())
        assert not draining.done()
        exchange.reply(b"done", ())
        assert (await held).head == b"done"
        assert await asyncio.wait_for(draining, TIMEOUT_S) == 0


async def test_a_drain_that_runs_out_of_time_says_what_is_open(rig: Rig) -> None:
    peer = Peer(rig, echoes=False)
    async with linked(await peer.start()) as link:
        held = asyncio.ensure_future(link.call(b"held", (), _deadline()))
        await asyncio.wait_for(peer.exchanges.get(), TIMEOUT_S)
        assert await peer.links.drain(Deadline.after(0.05)) == 1
        await rig.servers[0].stop(0.0)
        with pytest.raises(Unavailable):
            await held


async def test_a_stopped_server_fails_what_is_in_flight_and_is_found_again(rig: Rig) -> None:
    peer = Peer(rig, echoes=False)
    endpoint = await peer.start()
    async with linked(endpoint) as link:
        sinks = [Sink() for _ in range(5)]
        for sink in sinks:
            link.send(b"", (b"x",), _deadline(), sink)
        cancelled = asyncio.Event()
        (await asyncio.wait_for(peer.exchanges.get(), TIMEOUT_S)).on_cancel(cancelled.set)
        await rig.servers[0].stop(0.0)
        for sink in sinks:
            with pytest.raises(Unavailable, match="broke"):
                await soon(sink.outcome)
        assert cancelled.is_set()
        assert not link.is_connected
        with pytest.raises(Unavailable, match=endpoint):
            await link.wait_connected(Deadline.after(0.05))
        await Peer(rig, echoes=True).start(endpoint)
        await link.wait_connected(_deadline())
        assert (await link.call(b"again", (), _deadline())).head == b"again"


async def test_payloads_above_the_limit_are_refused_on_both_sides(rig: Rig) -> None:
    async def refused(link: LinkClient, size: int) -> None:
        with pytest.raises(MessageTooLarge, match=str(3 << 20)):
            await link.call(b"", (bytes(size),), _deadline())

    small = Peer(rig, echoes=True, max_message_bytes=3 << 20)
    async with linked(await small.start()) as link:
        await refused(link, (3 << 20) + 1)
        await refused(link, 20 << 20)
        assert len(_joined((await link.call(b"", (bytes(3 << 20),), _deadline())).payload)) == 3 << 20
    large = Peer(rig, echoes=False)
    async with linked(await large.start(), max_message_bytes=3 << 20) as link:
        await refused(link, (3 << 20) + 1)
        call = asyncio.ensure_future(link.call(b"", (), _deadline()))
        (await asyncio.wait_for(large.exchanges.get(), TIMEOUT_S)).reply(b"", (bytes(9 << 20),))
        with pytest.raises(MessageTooLarge, match=str(3 << 20)):
            await call
        again = asyncio.ensure_future(link.call(b"", (), _deadline()))
        (await asyncio.wait_for(large.exchanges.get(), TIMEOUT_S)).reply(b"ok", (bytes(3 << 20),))
        assert (await again).head == b"ok"


def _message(*frames: bytes) -> bytes:
    joined = b"".join(frames)
    return message_prefix(len(joined)) + joined


def _frame(kind: int, id: int = 1, flags: int = 0, body: bytes = b"") -> bytes:
    return HEADER.pack(kind, flags, 0, id, 0, len(body), 0) + body


@pytest.mark.parametrize(
    "hostile",
    [
        b"\xff" * 50,
        _message(b"garbage that is long enough to look like a header"),
        _message(_frame(TOKEN)),
        _message(_frame(CREDIT)),
        _message(_frame(RESPONSE)),
        _message(_frame(CHUNK)),
        _message(_frame(REQUEST, flags=MORE), _frame(REQUEST, flags=MORE)),
        _message(_frame(REQUEST), _frame(REQUEST)),
    ],
)
async def test_hostile_bytes_end_only_their_own_link(rig: Rig, hostile: bytes, caplog: pytest.LogCaptureFixture) -> None:
    peer = Peer(rig, echoes=False)
    endpoint = await peer.start()
    async with linked(endpoint) as link:
        call = asyncio.ensure_future(link.call(b"good", (), _deadline()))
        good = await asyncio.wait_for(peer.exchanges.get(), TIMEOUT_S)
        bad = rig.grpc_channel(endpoint).stream_stream(OPEN)()
        assert await bad.read() == b""
        await bad.write(hostile)
        assert await bad.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "is closed" in caplog.text
        good.reply(b"untouched", ())
        assert (await call).head == b"untouched"


async def test_a_client_refuses_a_peer_that_speaks_nonsense(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    async def nonsense(stream: object) -> None:
        await stream.write(b"")  # type: ignore[attr-defined]
        await stream.read()  # type: ignore[attr-defined]
        await stream.write(b"nonsense")  # type: ignore[attr-defined]

    endpoint = await rig.serve(prepare=lambda server: server.add_stream(OPEN, nonsense))
    async with linked(endpoint) as link:
        with pytest.raises(Unavailable, match="not a link's message"):
            await link.call(b"", (), _deadline())
        assert "is closed" in caplog.text


async def test_replies_for_a_peer_that_does_not_read_are_bounded(rig: Rig) -> None:
    size, num_requests = 4 << 20, 64
    num_taken = 0

    def answer(exchange: Exchange) -> None:
        nonlocal num_taken
        num_taken += 1
        exchange.reply(b"", (bytes(size),))

    links = LinkServer(answer, LIMIT)
    endpoint = await rig.serve(max_message_bytes=LIMIT, prepare=links.attach)
    call = rig.grpc_channel(endpoint).stream_stream(OPEN)()
    assert await call.read() == b""
    for number in range(num_requests):
        await call.write(_message(_frame(REQUEST, id=number)))
    async with linked(endpoint) as other:
        # Another link is served all the while; by the time it has had many turns, the greedy one has been held back.
        for _ in range(50):
            await other.call(b"", (), _deadline())
    assert num_taken - 50 <= MAX_WAITING_BYTES // size + 16
    # Once the peer reads, everything arrives.
    received = 0
    while received < num_requests * size:
        received += sum(len(frame.body) for frame in decode_message(await call.read()))
    assert num_taken == num_requests + 50


async def test_a_handler_that_raises_answers_its_exchange(rig: Rig) -> None:
    def crash(exchange: Exchange) -> None:
        raise InvalidRequest("bad head") if exchange.head else KeyError("bug")

    endpoint = await rig.serve(prepare=LinkServer(crash).attach)
    async with linked(endpoint) as link:
        with pytest.raises(InvalidRequest, match="bad head"):
            await link.call(b"x", (), _deadline())
        with pytest.raises(TensorwayError, match="KeyError"):
            await link.call(b"", (), _deadline())


async def test_changes_of_the_connection_are_told(rig: Rig) -> None:
    states: list[bool] = []
    peer = Peer(rig, echoes=True)
    client = create_link_client(await peer.start(), on_change=lambda: states.append(client.is_connected))
    assert not client.is_connected
    with pytest.raises(Unavailable, match="not been tried"):
        client.send(b"", (), _deadline(), Sink())
    running = asyncio.ensure_future(client.run())
    await client.wait_connected(_deadline())
    sink = Sink()
    running.cancel()
    client.send(b"", (), _deadline(), sink)
    with pytest.raises(asyncio.CancelledError):
        await running
    with pytest.raises(Unavailable, match="closed on this side"):
        await soon(sink.outcome)
    assert states == [True, False]
    assert ServerOptions("x").implementation == "completion-queue"
    assert Cancelled("x").is_retryable is False

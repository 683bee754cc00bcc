"""What a link refuses, and what it bounds."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tensorway.errors import MessageTooLarge, Unavailable
from tensorway.transport import LinkServer
from tensorway.transport.frames import CHUNK, CREDIT, HEADER, MORE, REQUEST, RESPONSE, TOKEN, decode_message, message_prefix
from tensorway.transport.link_server import MAX_WAITING_BYTES, OPEN
from tensorway.transport.port import Exchange, LinkClient, Stream

from .conftest import IMPLEMENTATIONS, LOCAL, TIMEOUT_S, Rig
from .links import LIMIT, Peer, in_time, joined, linked

pytestmark = pytest.mark.parametrize("rig", [*IMPLEMENTATIONS, LOCAL], indirect=True)


async def test_payloads_above_the_limit_are_refused_on_both_sides(rig: Rig) -> None:
    async def refused(link: LinkClient, size: int) -> None:
        with pytest.raises(MessageTooLarge, match=str(3 << 20)):
            await link.call(b"", (bytes(size),), in_time())

    small = Peer(rig, echoes=True, max_message_bytes=3 << 20)
    async with linked(await small.start()) as link:
        await refused(link, (3 << 20) + 1)
        await refused(link, 20 << 20)
        assert len(joined((await link.call(b"", (bytes(3 << 20),), in_time())).payload)) == 3 << 20
    large = Peer(rig, echoes=False)
    async with linked(await large.start(), max_message_bytes=3 << 20) as link:
        await refused(link, (3 << 20) + 1)
        call = asyncio.ensure_future(link.call(b"", (), in_time()))
        (await asyncio.wait_for(large.exchanges.get(), TIMEOUT_S)).reply(b"", (bytes(9 << 20),))
        with pytest.raises(MessageTooLarge, match=str(3 << 20)):
            await call
        again = asyncio.ensure_future(link.call(b"", (), in_time()))
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
        call = asyncio.ensure_future(link.call(b"good", (), in_time()))
        good = await asyncio.wait_for(peer.exchanges.get(), TIMEOUT_S)
        bad = rig.grpc_channel(endpoint).stream_stream(OPEN)()
        assert await bad.read() == b""
        await bad.write(hostile)
        assert await bad.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "is closed" in caplog.text
        good.reply(b"untouched", ())
        assert (await call).head == b"untouched"


async def test_a_client_refuses_a_peer_that_speaks_nonsense(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    async def nonsense(stream: Stream) -> None:
        await stream.write(b"")
        await stream.read()
        await stream.write(b"nonsense")

    endpoint = await rig.serve(prepare=lambda server: server.add_stream(OPEN, nonsense))
    async with linked(endpoint) as link:
        with pytest.raises(Unavailable, match="not a link's message"):
            await link.call(b"", (), in_time())
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
            await other.call(b"", (), in_time())
    assert num_taken - 50 <= MAX_WAITING_BYTES // size + 16
    # Once the peer reads, everything arrives.
    received = 0
    while received < num_requests * size:
        received += sum(len(frame.body) for frame in decode_message(await call.read()))
    assert num_taken == num_requests + 50

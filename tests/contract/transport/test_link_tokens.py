"""Tokens and their credit, over real sockets."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest

from tensorway.deadline import Deadline
from tensorway.errors import InternalError, InvalidRequest, ModelFailed, TensorwayError, Unavailable
from tensorway.transport.frames import CREDIT, HEADER, REQUEST, TOKEN, decode_message, message_prefix
from tensorway.transport.link_server import OPEN
from tensorway.transport.port import TOKEN_CREDIT, Exchange, LinkClient, Stream

from .conftest import IMPLEMENTATIONS, LOCAL, TIMEOUT_S, Rig, soon
from .links import Peer, Sink, in_time, linked

pytestmark = pytest.mark.parametrize("rig", [*IMPLEMENTATIONS, LOCAL], indirect=True)


class TokenReader(Sink):
    """Remembers the tokens of one request, and grants one more for each as soon as it has come, unless told to wait."""

    def __init__(self, link: LinkClient, *, grants: bool = True) -> None:
        super().__init__()
        self.link = link
        self.grants = grants
        self.id = 0
        self.tokens: list[bytes] = []
        self.num_errors = 0
        self.came = asyncio.Event()

    def on_token(self, head: bytes) -> None:
        assert not self.outcome.done()
        self.tokens.append(head)
        self.came.set()
        if self.grants:
            self.link.grant(self.id, 1)

    def on_error(self, error: TensorwayError) -> None:
        self.num_errors += 1
        super().on_error(error)

    def begin(self, head: bytes = b"") -> TokenReader:
        self.id = self.link.send(head, (), in_time(), self)
        return self

    async def until(self, num_tokens: int) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while len(self.tokens) < num_tokens:
                self.came.clear()
                await self.came.wait()


class Writer:
    """Pushes numbered tokens for as long as there is credit, and goes on when more comes; then replies."""

    def __init__(self, exchange: Exchange, num_tokens: int) -> None:
        self.exchange = exchange
        self.num_tokens = num_tokens
        self.num_pushed = 0
        self.num_refills = 0
        exchange.on_credit(self._refill)
        self._push()

    def _refill(self) -> None:
        self.num_refills += 1
        self._push()

    def _push(self) -> None:
        while self.num_pushed < self.num_tokens and self.exchange.credit:
            self.exchange.push(b"%d" % self.num_pushed)
            self.num_pushed += 1
        if self.num_pushed == self.num_tokens:
            self.exchange.reply(b"", ())


def numbers(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


async def arrival(peer: Peer) -> Exchange:
    return await asyncio.wait_for(peer.exchanges.get(), TIMEOUT_S)


async def test_tokens_of_many_streams_arrive_in_order_and_before_the_reply(rig: Rig) -> None:
    peer = Peer(rig, echoes=False)
    async with linked(await peer.start()) as link:
        lengths = [random.Random(7).randrange(200) for _ in range(40)]
        readers = [TokenReader(link).begin() for _ in lengths]
        writers = [Writer(await arrival(peer), length) for length in lengths]
        for reader, length in zip(readers, lengths, strict=True):
            assert await soon(reader.outcome) == (b"", ())
            assert reader.tokens == numbers(length)
        # The credit was less than the stream: it came again and again.
        assert sum(writer.num_refills for writer in writers) > len(writers)
        assert link.num_in_flight == peer.links.num_open == 0


async def test_the_first_tokens_need_no_grant_and_no_more_leave_without_one(rig: Rig) -> None:
    peer = Peer(rig, echoes=False)
    async with linked(await peer.start()) as link:
        silent, eager = TokenReader(link, grants=False).begin(), TokenReader(link).begin()
        stuck = Writer(await arrival(peer), 100)
        assert (stuck.num_pushed, stuck.exchange.credit) == (TOKEN_CREDIT, 0)
        with pytest.raises(InternalError, match="no credit"):
            stuck.exchange.push(b"one too many")
        # Another stream of the same link runs to its end meanwhile.
        Writer(await arrival(peer), 1000)
        await soon(eager.outcome)
        assert eager.tokens == numbers(1000)
        assert silent.tokens == numbers(TOKEN_CREDIT)
        assert stuck.num_refills == 0
        # One grant is gathered with the next that makes half of the credit; nothing is lost on the way.
        for _ in range(TOKEN_CREDIT // 2):
            link.grant(silent.id, 1)
        await silent.until(TOKEN_CREDIT + TOKEN_CREDIT // 2)
        silent.grants = True
        link.grant(silent.id, TOKEN_CREDIT)
        await soon(silent.outcome)
        assert silent.tokens == numbers(100)


async def test_small_grants_leave_with_what_else_leaves(rig: Rig) -> None:
    peer = Peer(rig, echoes=False)
    async with linked(await peer.start()) as link:
        reader = TokenReader(link, grants=False).begin()
        writer = Writer(await arrival(peer), 100)
        await reader.until(TOKEN_CREDIT)
        link.grant(reader.id, 1)
        other = asyncio.ensure_future(link.call(b"", (), in_time()))
        (await arrival(peer)).reply(b"", ())
        await other
        await reader.until(TOKEN_CREDIT + 1)
        assert writer.num_pushed == TOKEN_CREDIT + 1


async def test_more_than_was_received_cannot_be_granted(rig: Rig) -> None:
    peer = Peer(rig, echoes=False)
    async with linked(await peer.start()) as link:
        reader = TokenReader(link, grants=False).begin()
        link.grant(reader.id, 5)  # nothing has come yet: nothing to grant, and nobody to tell
        (await arrival(peer)).push(b"token")
        await reader.until(1)
        for wrong in (2, -1):
            with pytest.raises(InternalError, match="granted"):
                link.grant(reader.id, wrong)
        link.grant(reader.id, 1)
        with pytest.raises(InternalError, match="granted"):
            link.grant(reader.id, 1)
        link.grant(12345, 1)
        assert link.is_connected


async def test_a_cancel_in_mid_stream_silences_both_sides(rig: Rig) -> None:
    peer = Peer(rig, echoes=False)
    async with linked(await peer.start()) as link:
        for stop_at in range(1, 12):
            reader, cancelled = TokenReader(link).begin(), asyncio.Event()
            exchange = await arrival(peer)
            exchange.on_cancel(cancelled.set)
            Writer(exchange, 5000)
            await reader.until(stop_at)
            link.cancel(reader.id)
            num_read = len(reader.tokens)
            link.grant(reader.id, 1)
            await soon(cancelled.wait())
            exchange.push(b"dropped")
            exchange.reply(b"late", ())
            # What else there is on the link goes on, and nothing more of this stream comes.
            after = asyncio.ensure_future(link.call(b"", (), in_time()))
            (await arrival(peer)).reply(b"after", ())
            assert (await after).head == b"after"
            assert (len(reader.tokens), reader.outcome.done()) == (num_read, False)
        assert link.num_in_flight == peer.links.num_open == 0


async def test_an_error_ends_a_stream_after_its_tokens(rig: Rig) -> None:
    peer = Peer(rig, echoes=False)
    async with linked(await peer.start()) as link:
        reader = TokenReader(link).begin()
        exchange = await arrival(peer)
        for head in numbers(TOKEN_CREDIT):
            exchange.push(head)
        exchange.fail(ModelFailed("no more words"))
        exchange.push(b"dropped")
        with pytest.raises(ModelFailed, match="no more words"):
            await soon(reader.outcome)
        assert reader.tokens == numbers(TOKEN_CREDIT)
        assert reader.num_errors == 1


async def test_a_broken_connection_is_told_once_to_every_stream(rig: Rig) -> None:
    peer = Peer(rig, echoes=False)
    endpoint = await peer.start()
    async with linked(endpoint) as link:
        readers, cancelled = [TokenReader(link).begin() for _ in range(5)], asyncio.Event()
        for reader in readers:
            exchange = await arrival(peer)
            exchange.on_cancel(cancelled.set)
            exchange.push(b"token")
            await reader.until(1)
        await peer.stop()
        for reader in readers:
            with pytest.raises(Unavailable, match="broke"):
                await soon(reader.outcome)
            link.grant(reader.id, 1)  # of no use, and no harm
            assert (reader.tokens, reader.num_errors) == ([b"token"], 1)
        await soon(cancelled.wait())
        # Found again, ids may come again: what was granted before counts for nothing.
        again = Peer(rig, echoes=False)
        await again.start(endpoint)
        await link.wait_connected(in_time())
        reader = TokenReader(link).begin()
        Writer(await arrival(again), 50)
        await soon(reader.outcome)
        assert reader.tokens == numbers(50)


async def test_a_drain_waits_for_streams_which_go_on_with_their_credit(rig: Rig) -> None:
    peer, changed = Peer(rig, echoes=False), asyncio.Event()
    async with linked(await peer.start(), on_change=changed.set) as link:
        changed.clear()
        reader = TokenReader(link, grants=False).begin()
        Writer(await arrival(peer), 60)
        await reader.until(TOKEN_CREDIT)
        draining = asyncio.ensure_future(peer.links.drain(in_time()))
        await soon(changed.wait())
        assert not link.is_connected
        assert not draining.done()
        reader.grants = True
        link.grant(reader.id, TOKEN_CREDIT)
        await soon(reader.outcome)
        assert reader.tokens == numbers(60)
        assert await asyncio.wait_for(draining, TIMEOUT_S) == 0


async def test_a_drain_at_its_end_says_which_streams_are_open(rig: Rig) -> None:
    peer = Peer(rig, echoes=False)
    async with linked(await peer.start()) as link:
        reader = TokenReader(link, grants=False).begin()
        Writer(await arrival(peer), 60)
        assert await peer.links.drain(Deadline.after(0.05)) == 1
        await peer.stop()
        with pytest.raises(Unavailable):
            await soon(reader.outcome)


async def test_tokens_for_a_request_that_takes_none_end_the_link(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    peer = Peer(rig, echoes=False)
    async with linked(await peer.start()) as link:
        call = asyncio.ensure_future(link.call(b"", (), in_time()))
        (await arrival(peer)).push(b"token")
        with pytest.raises(Unavailable, match="not answered with tokens"):
            await call
        assert "is closed" in caplog.text


def message(kind: int, count: int, head: bytes = b"", value: int = 0) -> bytes:
    frames = (HEADER.pack(kind, 0, 0, 1, len(head), 0, value) + head) * count
    return message_prefix(len(frames)) + frames


async def test_a_peer_that_overruns_its_credit_is_broken(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    async def overrun(stream: Stream) -> None:
        await stream.write(b"")
        await stream.read()
        await stream.write(message(TOKEN, TOKEN_CREDIT + 1, b"token"))
        await stream.read()

    endpoint = await rig.serve(prepare=lambda server: server.add_stream(OPEN, overrun))
    async with linked(endpoint) as link:
        reader = TokenReader(link, grants=False).begin()
        with pytest.raises(Unavailable, match="more tokens than were granted"):
            await soon(reader.outcome)
        assert len(reader.tokens) == TOKEN_CREDIT
        assert "is closed" in caplog.text


@pytest.mark.parametrize("value", [1, TOKEN_CREDIT + 1, 2**64 - 1])
async def test_credit_for_what_was_not_sent_ends_the_link(rig: Rig, value: int, caplog: pytest.LogCaptureFixture) -> None:
    peer = Peer(rig, echoes=False)
    endpoint = await peer.start()
    call = rig.grpc_channel(endpoint).stream_stream(OPEN)()
    assert await call.read() == b""
    # For an id that is not known, credit is late, and ignored.
    await call.write(message(CREDIT, 1, value=value))
    await call.write(message(REQUEST, 1))
    (await arrival(peer)).push(b"token")
    (frame,) = decode_message(await call.read())
    assert (frame.kind, frame.head) == (TOKEN, b"token")
    await call.write(message(CREDIT, 1, value=1))
    await call.write(message(CREDIT, 1, value=value))
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "more than it was sent" in caplog.text


async def test_the_reply_of_a_stream_may_be_an_error_of_the_caller(rig: Rig) -> None:
    peer = Peer(rig, echoes=False)
    async with linked(await peer.start()) as link:
        reader = TokenReader(link).begin()
        (await arrival(peer)).fail(InvalidRequest("no prompt", field="prompt"))
        with pytest.raises(InvalidRequest, match="no prompt"):
            await soon(reader.outcome)
        assert reader.tokens == []

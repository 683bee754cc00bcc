"""The client's side of a bidirectional stream, against both servers."""

from __future__ import annotations

import asyncio

import pytest

from tensorway.errors import FailedPrecondition, Unavailable
from tensorway.transport.port import Stream
from tests.contract.transport.conftest import STREAM, TIMEOUT_S, Rig


async def test_messages_go_both_ways_and_the_end_is_none(rig: Rig) -> None:
    async def count(stream: Stream) -> None:
        for _ in range(3):
            message = await stream.read()
            await stream.write(b"got " + (message or b""))

    stream = rig.channel(await rig.serve(stream=count)).stream(STREAM)
    for number in range(3):
        await stream.write(str(number).encode())
        assert await stream.read() == b"got %d" % number
    assert await stream.read() is None
    await stream.cancel()


async def test_the_servers_error_reaches_the_reader_with_its_kind(rig: Rig) -> None:
    async def refuse(stream: Stream) -> None:
        raise FailedPrecondition("not like this", field="orders")

    stream = rig.channel(await rig.serve(stream=refuse)).stream(STREAM)
    with pytest.raises(FailedPrecondition, match="not like this") as refused:
        await stream.read()
    assert refused.value.field == "orders"
    with pytest.raises(Unavailable, match="has ended"):
        await stream.write(b"too late")
    await stream.cancel()
    await stream.cancel()


async def test_who_is_refused_before_the_first_message_still_reads_why(rig: Rig) -> None:
    """The server knows at once, and the client writes later."""
    begun = asyncio.Event()

    async def refuse(stream: Stream) -> None:
        begun.set()
        raise FailedPrecondition("not like this", field="orders")

    endpoint = await rig.serve(stream=refuse)
    for _ in range(3):
        begun.clear()
        stream = rig.channel(endpoint).stream(STREAM)
        await begun.wait()
        await asyncio.sleep(0.05)
        await stream.write(b"the first message")
        with pytest.raises(FailedPrecondition, match="not like this"):
            await stream.read()
        await stream.cancel()


async def test_nobody_there_is_unavailable(rig: Rig) -> None:
    stream = rig.channel("127.0.0.1:1").stream(STREAM)
    with pytest.raises(Unavailable):
        await stream.read()
    await stream.cancel()


async def test_a_read_that_is_cancelled_loses_nothing(rig: Rig) -> None:
    release = asyncio.Event()

    async def late(stream: Stream) -> None:
        await release.wait()
        await stream.write(b"first")
        await stream.write(await stream.read() or b"nothing")

    stream = rig.channel(await rig.serve(stream=late)).stream(STREAM)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await stream.read()
    release.set()
    assert await stream.read() == b"first"
    await stream.write(b"second")
    assert await stream.read() == b"second"
    assert await stream.read() is None
    await stream.cancel()


async def test_cancelling_ends_the_handler(rig: Rig) -> None:
    ended = asyncio.Event()

    async def wait(stream: Stream) -> None:
        try:
            await stream.read()
            await stream.read()
        finally:
            ended.set()

    stream = rig.channel(await rig.serve(stream=wait)).stream(STREAM)
    await stream.write(b"begin")
    reading = asyncio.ensure_future(stream.read())
    await asyncio.sleep(0.05)
    await stream.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(reading, TIMEOUT_S)
    await asyncio.wait_for(ended.wait(), TIMEOUT_S)


async def test_a_server_that_stops_is_unavailable(rig: Rig) -> None:
    stream = rig.channel(await rig.serve()).stream(STREAM)
    await stream.write(b"x")
    assert await stream.read() == b"x"
    await rig.servers[0].stop(0.0)
    with pytest.raises(Unavailable):
        await stream.read()
    await stream.cancel()

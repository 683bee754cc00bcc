"""What every server implementation owes its clients, asked by real grpc clients."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status as RichStatus

from tensorway.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    MessageTooLarge,
    Overloaded,
    TensorwayError,
    Unavailable,
    Unimplemented,
)
from tensorway.transport import BlockingChannel, create_server
from tensorway.transport.port import Call, ServerOptions, Stream

from .conftest import STREAM, TIMEOUT_S, UNARY, Gate, Rig, echo, soon


async def test_unary_returns_the_bytes_it_was_sent(rig: Rig) -> None:
    channel = rig.channel(await rig.serve())
    for request in (b"", b"x", bytes(range(256)) * 64):
        assert (await channel.unary(UNARY, request, TIMEOUT_S)).response == request


async def test_a_blocking_client_is_served_too(rig: Rig) -> None:
    channel = BlockingChannel(await rig.serve())
    try:
        reply = await asyncio.to_thread(channel.unary, UNARY, b"sync", TIMEOUT_S)
        assert reply.response == b"sync"
        with pytest.raises(Unimplemented):
            await asyncio.to_thread(channel.unary, "/test.Service/Missing", b"", TIMEOUT_S)
    finally:
        channel.close()


async def test_many_at_once_are_not_mixed_up(rig: Rig) -> None:
    async def slow_echo(request: bytes, call: Call) -> bytes:
        await asyncio.sleep(0)
        return request

    channel = rig.channel(await rig.serve(slow_echo))
    requests = [b"%d" % number * 100 for number in range(300)]
    replies = await asyncio.gather(*(channel.unary(UNARY, request, TIMEOUT_S) for request in requests))
    assert [reply.response for reply in replies] == requests
    assert rig.servers[0].num_in_flight == 0


async def test_metadata_reaches_the_handler_and_trailers_the_client(rig: Rig) -> None:
    seen: list[Call] = []

    async def answer(request: bytes, call: Call) -> bytes:
        seen.append(call)
        assert dict(call.metadata)["x-name"] == "value"
        assert call.metadata["x-bytes-bin"] == b"\x00\xff"
        assert call.method == UNARY
        assert "127.0.0.1" in call.peer
        call.set_trailers((("tensorway-timing", "queue=1"), ("proof-bin", b"\x01\x00")))
        return b""

    endpoint = await rig.serve(answer)
    call = rig.grpc_channel(endpoint).unary_unary(UNARY)(b"", metadata=(("x-name", "value"), ("x-bytes-bin", b"\x00\xff")))
    assert await call == b""
    trailers = dict(await call.trailing_metadata())
    assert trailers["tensorway-timing"] == "queue=1"
    assert trailers["proof-bin"] == b"\x01\x00"
    assert len(seen) == 1


async def test_the_deadline_is_the_clients(rig: Rig) -> None:
    seen: list[float | None] = []

    async def answer(request: bytes, call: Call) -> bytes:
        seen.append(call.deadline.remaining_s() if call.deadline is not None else None)
        return b""

    channel = rig.channel(await rig.serve(answer))
    await channel.unary(UNARY, b"", 1000.0)
    await channel.unary(UNARY, b"", None)
    assert seen[0] is not None
    # grpc writes a deadline with two or three digits, rounded up.
    assert 900.0 < seen[0] <= 1020.0
    assert seen[1] is None


async def test_an_error_carries_status_sentence_and_google_rpc_details(rig: Rig) -> None:
    async def refuse(request: bytes, call: Call) -> bytes:
        call.set_trailers((("tensorway-timing", "queue=2"),))
        raise Overloaded("the queue of “größe” is full", field="inputs[0]", hop="orchestrator", retry_after_s=2.5)

    endpoint = await rig.serve(refuse)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await rig.grpc_channel(endpoint).unary_unary(UNARY)(b"")
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raised.value.details() == "the queue of “größe” is full"
    trailers = dict(raised.value.trailing_metadata())
    assert trailers["tensorway-timing"] == "queue=2"
    rich = RichStatus.FromString(trailers["grpc-status-details-bin"])
    info, bad, retry = ErrorInfo(), BadRequest(), RetryInfo()
    assert rich.details[0].Unpack(info)
    assert (info.domain, info.reason, dict(info.metadata)) == ("tensorway", "OVERLOADED", {"hop": "orchestrator"})
    assert rich.details[1].Unpack(bad)
    assert bad.field_violations[0].field == "inputs[0]"
    assert rich.details[2].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 2500

    with pytest.raises(Overloaded) as ours:
        await rig.channel(endpoint).unary(UNARY, b"", TIMEOUT_S)
    assert (ours.value.field, ours.value.hop, ours.value.retry_after_s) == ("inputs[0]", "orchestrator", 2.5)


async def test_a_very_long_sentence_still_reaches_the_client(rig: Rig) -> None:
    async def refuse(request: bytes, call: Call) -> bytes:
        raise InvalidRequest("ß" * 50_000, field="f" * 5_000)

    with pytest.raises(InvalidRequest, match="100000 bytes in all"):
        await rig.channel(await rig.serve(refuse)).unary(UNARY, b"", TIMEOUT_S)


async def test_a_bug_in_a_handler_is_internal_and_logged(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    async def crash(request: bytes, call: Call) -> bytes:
        raise ZeroDivisionError("no such luck")

    async def crash_stream(stream: Stream) -> None:
        raise ZeroDivisionError("no such stream")

    endpoint = await rig.serve(crash, crash_stream)
    with caplog.at_level(logging.ERROR), pytest.raises(InternalError, match="ZeroDivisionError: no such luck"):
        await rig.channel(endpoint).unary(UNARY, b"", TIMEOUT_S)
    assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records)
    call = rig.grpc_channel(endpoint).stream_stream(STREAM)()
    assert await call.code() is grpc.StatusCode.INTERNAL
    assert "no such stream" in await call.details()


async def test_an_unknown_method_or_service_is_unimplemented(rig: Rig) -> None:
    channel = rig.channel(await rig.serve())
    with pytest.raises(Unimplemented, match=r"there is no method /test.Service/Missing here"):
        await channel.unary("/test.Service/Missing", b"", TIMEOUT_S)
    with pytest.raises(Unimplemented, match=r"there is no service other.Service here"):
        await channel.unary("/other.Service/Unary", b"", TIMEOUT_S)


async def test_a_request_above_the_limit_is_refused_naming_the_limit(rig: Rig) -> None:
    channel = rig.channel(await rig.serve(max_message_bytes=5000))
    assert len((await channel.unary(UNARY, b"x" * 5000, TIMEOUT_S)).response) == 5000
    with pytest.raises(MessageTooLarge, match="5000"):
        await channel.unary(UNARY, b"x" * 5001, TIMEOUT_S)


async def test_a_reply_above_the_limit_is_refused_naming_the_limit(rig: Rig) -> None:
    async def inflate(request: bytes, call: Call) -> bytes:
        return b"x" * 5001

    with pytest.raises(MessageTooLarge, match="5000"):
        await rig.channel(await rig.serve(inflate, max_message_bytes=5000)).unary(UNARY, b"", TIMEOUT_S)


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_requests_are_understood(rig: Rig, compression: grpc.Compression) -> None:
    endpoint = await rig.serve()
    request = b"again and again " * 1000
    assert await rig.grpc_channel(endpoint, compression).unary_unary(UNARY)(request) == request


async def test_a_full_server_says_so_and_when_to_come_back(rig: Rig) -> None:
    gate = Gate()
    channel = rig.channel(await rig.serve(gate, max_concurrent_rpcs=2))
    held = [asyncio.ensure_future(channel.unary(UNARY, b"held", TIMEOUT_S)) for _ in range(2)]
    for _ in held:
        await soon(gate.began.get())
    assert rig.servers[0].num_in_flight == 2
    with pytest.raises(Overloaded, match="2 RPCs") as refused:
        await channel.unary(UNARY, b"", TIMEOUT_S)
    assert refused.value.retry_after_s > 0.0
    gate.opened.set()
    assert [reply.response for reply in await asyncio.gather(*held)] == [b"held", b"held"]
    assert (await channel.unary(UNARY, b"again", TIMEOUT_S)).response == b"again"


async def test_a_unary_method_needs_a_message(rig: Rig) -> None:
    call = rig.grpc_channel(await rig.serve()).stream_unary(UNARY)()
    await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError, match="exactly one request message") as raised:
        await call
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_streams_of_every_shape(rig: Rig) -> None:
    async def sum_then_count(stream: Stream) -> None:
        total = 0
        while (message := await stream.read()) is not None:
            total += int(message)
        assert await stream.read() is None
        for number in range(total):
            await stream.write(b"%d" % number)
        stream.set_trailers((("total", str(total)),))

    channel = rig.grpc_channel(await rig.serve(stream=sum_then_count))
    server_streaming = channel.unary_stream(STREAM)(b"3")
    assert [message async for message in server_streaming] == [b"0", b"1", b"2"]
    assert dict(await server_streaming.trailing_metadata())["total"] == "3"

    async def numbers() -> AsyncIterator[bytes]:
        for number in (b"1", b"0"):
            yield number

    assert await channel.stream_unary(STREAM)(numbers()) == b"0"
    assert [message async for message in channel.stream_stream(STREAM)(numbers())] == [b"0"]


async def test_a_stream_is_a_conversation(rig: Rig) -> None:
    call = rig.grpc_channel(await rig.serve()).stream_stream(STREAM)()
    for number in range(50):
        await call.write(b"%d" % number)
        assert await call.read() == b"%d" % number
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_a_stream_can_fail_after_messages(rig: Rig) -> None:
    async def fail_late(stream: Stream) -> None:
        await stream.write(b"first")
        raise DeadlineExceeded("the step took too long", hop="leader")

    call = rig.grpc_channel(await rig.serve(stream=fail_late)).unary_stream(STREAM)(b"")
    assert await call.read() == b"first"
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await call.details() == "the step took too long"


async def test_what_is_offered_comes_in_order_with_what_is_written(rig: Rig) -> None:
    """A server may take no offer at all; what it takes is sent, and what it does not take was not sent."""
    num_taken = 0

    async def count(stream: Stream) -> None:
        nonlocal num_taken
        for number in range(500):
            if stream.offer(b"%d" % number):
                num_taken += 1
            else:
                await stream.write(b"%d" % number)
            if number % 7 == 0:
                await asyncio.sleep(0.001)

    call = rig.grpc_channel(await rig.serve(stream=count)).unary_stream(STREAM)(b"")
    assert [message async for message in call] == [b"%d" % number for number in range(500)]
    assert await call.code() is grpc.StatusCode.OK
    # The first comes with the initial metadata, and is as good as any.
    assert num_taken > 50 or rig.implementation == "aio"


async def test_a_client_that_does_not_read_is_offered_nothing_more(rig: Rig) -> None:
    message, refused, went_on = bytes(1 << 19), asyncio.Event(), asyncio.Event()
    num_messages = 1

    async def flood(stream: Stream) -> None:
        nonlocal num_messages
        await stream.write(message)
        while stream.offer(message):
            num_messages += 1
            assert num_messages < 1000
            await asyncio.sleep(0.01)
        refused.set()
        await went_on.wait()
        await stream.write(b"end")

    call = rig.grpc_channel(await rig.serve(stream=flood)).unary_stream(STREAM)(b"")
    await asyncio.wait_for(refused.wait(), TIMEOUT_S)
    went_on.set()
    assert [len(each) async for each in call] == [len(message)] * num_messages + [3]


async def test_an_offer_to_a_client_that_went_away_is_refused(rig: Rig) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def talk(stream: Stream) -> None:
        await stream.write(b"first")
        gone = asyncio.Event()
        stream.on_cancel(gone.set)
        began.set()
        try:
            while not gone.is_set():
                stream.offer(b"more")
                await asyncio.sleep(0)
        finally:
            assert not stream.offer(b"too late")
            ended.set()

    endpoint = await rig.serve(stream=talk)
    call = rig.grpc_channel(endpoint).unary_stream(STREAM)(b"")
    assert await call.read() == b"first"
    await asyncio.wait_for(began.wait(), TIMEOUT_S)
    call.cancel()
    await asyncio.wait_for(ended.wait(), TIMEOUT_S)
    # The server is none the worse for it.
    assert await rig.grpc_channel(endpoint).unary_unary(UNARY)(b"still", timeout=TIMEOUT_S) == b"still"


async def test_a_taken_port_is_unavailable_and_named(rig: Rig) -> None:
    endpoint = await rig.serve()
    with pytest.raises(Unavailable, match=endpoint):
        await rig.serve(endpoint=endpoint)
    # The first one is none the worse for it.
    assert (await rig.channel(endpoint).unary(UNARY, b"still", TIMEOUT_S)).response == b"still"


async def test_an_address_of_another_machine_is_unavailable(rig: Rig) -> None:
    with pytest.raises(Unavailable, match=r"192.0.2.1:0"):
        await rig.serve(endpoint="192.0.2.1:0")


async def test_unix_sockets(rig: Rig, tmp_path: Path) -> None:
    endpoint = f"unix:{tmp_path}/socket"
    assert await rig.serve(endpoint=endpoint) == endpoint
    assert (await rig.channel(endpoint).unary(UNARY, b"local", TIMEOUT_S)).response == b"local"
    with pytest.raises(Unavailable, match="another process listens"):
        await rig.serve(endpoint=endpoint)


async def test_a_stale_unix_socket_is_taken_over_and_a_file_is_not(rig: Rig, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{tmp_path}/stale")
    endpoint = await rig.serve(endpoint=f"unix:{tmp_path}/stale")
    assert (await rig.channel(endpoint).unary(UNARY, b"", TIMEOUT_S)).response == b""
    (tmp_path / "file").write_text("precious")
    with pytest.raises(Unavailable, match="not a socket"):
        await rig.serve(endpoint=f"unix:{tmp_path}/file")
    assert (tmp_path / "file").read_text() == "precious"


async def test_handlers_are_checked_when_they_are_added(rig: Rig) -> None:
    server = create_server(ServerOptions("127.0.0.1:0", rig.implementation))
    server.add_unary(UNARY, echo)
    with pytest.raises(FailedPrecondition, match="already has a handler"):
        server.add_unary(UNARY, echo)
    with pytest.raises(FailedPrecondition, match="not a full method name"):
        server.add_unary("Unary", echo)


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(TensorwayError, match="carrier-pigeon"):
        create_server(ServerOptions("127.0.0.1:0", "carrier-pigeon"))


async def test_the_first_free_port_of_a_range_is_taken(rig: Rig) -> None:
    """Until none is left; what is no range is said."""
    first = await _free_pair()
    ports = f"127.0.0.1:{first}-{first + 1}"
    assert [await rig.serve(endpoint=ports) for _ in range(2)] == [f"127.0.0.1:{first}", f"127.0.0.1:{first + 1}"]
    with pytest.raises(Unavailable, match=f"cannot listen on {ports}: it is in use"):
        await rig.serve(endpoint=ports)
    for bad in ("9-8", "0-5", "-5", "5-", "1-65536"):
        with pytest.raises(InvalidRequest, match="is no range of ports"):
            await rig.serve(endpoint=f"127.0.0.1:{bad}")


async def _free_pair() -> int:
    """The first of two neighbouring ports that are free."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port

"""Cancellation, stopping, and what must not be left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from typing import Any

import grpc
import pytest

from tensorway.errors import Cancelled, DeadlineExceeded, TensorwayError, Unavailable
from tensorway.transport import AsyncChannel
from tensorway.transport.port import Call, Stream

from .conftest import STREAM, TIMEOUT_S, UNARY, Gate, Rig, echo_stream, soon

_HANGING_CLIENT = """
import sys, grpc
channel = grpc.insecure_channel(sys.argv[1])
channel.unary_unary(sys.argv[2])(b"")
"""


async def test_a_clients_cancel_reaches_the_handler(rig: Rig) -> None:
    gate = Gate()
    call = rig.grpc_channel(await rig.serve(gate)).unary_unary(UNARY)(b"")
    await soon(gate.began.get())
    call.cancel()
    await soon(gate.cancelled.wait())
    await soon(gate.unwound.wait())


async def test_a_client_that_is_killed_cancels_the_handler(rig: Rig) -> None:
    gate = Gate()
    endpoint = await rig.serve(gate)
    client = subprocess.Popen([sys.executable, "-c", _HANGING_CLIENT, endpoint, UNARY])
    try:
        await soon(gate.began.get())
    finally:
        client.kill()
        client.wait()
    await soon(gate.cancelled.wait())
    await soon(gate.unwound.wait())


async def test_a_deadline_that_passes_cancels_the_handler(rig: Rig) -> None:
    gate = Gate()
    channel = rig.channel(await rig.serve(gate))
    with pytest.raises(DeadlineExceeded):
        await channel.unary(UNARY, b"", 0.3)
    await soon(gate.cancelled.wait())
    await soon(gate.unwound.wait())


async def test_on_cancel_is_not_called_after_a_reply(rig: Rig) -> None:
    cancelled: list[bool] = []
    calls: list[Call] = []

    async def answer(request: bytes, call: Call) -> bytes:
        call.on_cancel(lambda: cancelled.append(True))
        calls.append(call)
        return request

    endpoint = await rig.serve(answer)
    channel = AsyncChannel(endpoint)
    await channel.unary(UNARY, b"", TIMEOUT_S)
    await channel.close()
    await rig.servers[0].stop(TIMEOUT_S)
    assert len(calls) == 1
    assert cancelled == []


async def test_a_callback_that_raises_harms_nobody(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()

    def crash() -> None:
        raise ZeroDivisionError("a callback's bug")

    async def answer(request: bytes, call: Call) -> bytes:
        call.on_cancel(crash)
        return await gate(request, call)

    call = rig.grpc_channel(await rig.serve(answer)).unary_unary(UNARY)(b"")
    await soon(gate.began.get())
    call.cancel()
    await soon(gate.cancelled.wait())
    await soon(gate.unwound.wait())
    assert "an on_cancel callback" in caplog.text


async def test_a_stream_learns_that_its_client_has_gone(rig: Rig) -> None:
    began, ended = asyncio.Event(), asyncio.Event()
    outcome: list[BaseException] = []

    async def forever(stream: Stream) -> None:
        began.set()
        try:
            while True:
                await stream.write(b"x" * 1024)
        except (Cancelled, asyncio.CancelledError) as error:
            outcome.append(error)
            raise
        finally:
            ended.set()

    call = rig.grpc_channel(await rig.serve(stream=forever)).unary_stream(STREAM)(b"")
    await soon(began.wait())
    await call.read()
    call.cancel()
    await soon(ended.wait())
    assert len(outcome) == 1


async def test_stop_lets_running_rpcs_end_and_refuses_new_ones(rig: Rig) -> None:
    gate = Gate()
    endpoint = await rig.serve(gate)
    held = asyncio.ensure_future(rig.channel(endpoint).unary(UNARY, b"held", TIMEOUT_S))
    await soon(gate.began.get())
    stopping = asyncio.ensure_future(rig.servers[0].stop(TIMEOUT_S))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await rig.channel(endpoint).unary(UNARY, b"new", TIMEOUT_S)
    assert not stopping.done()
    gate.opened.set()
    assert (await held).response == b"held"
    await soon(stopping)
    assert rig.servers[0].num_in_flight == 0


async def test_what_meets_a_stop_halfway_is_unavailable_and_may_be_sent_elsewhere(rig: Rig) -> None:
    """grpc core answers CANCELLED to what has reached it and was not taken yet; a client must not think that it cancelled."""
    endpoint = await rig.serve()
    channels = [rig.channel(endpoint) for _ in range(4)]
    ends: list[TensorwayError] = []
    answered = asyncio.Event()

    async def call_until_it_fails(channel: AsyncChannel) -> None:
        try:
            while True:
                await channel.unary(UNARY, b"", TIMEOUT_S)
                answered.set()
        except TensorwayError as error:
            ends.append(error)

    async with asyncio.TaskGroup() as callers:
        for channel in channels * 16:
            callers.create_task(call_until_it_fails(channel))
        await soon(answered.wait())
        await soon(rig.servers[0].stop(TIMEOUT_S))
    assert len(ends) == 64
    assert {type(error) for error in ends} == {Unavailable}


async def test_stop_cancels_what_outlives_the_grace_and_the_client_reads_why(rig: Rig) -> None:
    gate = Gate()
    endpoint = await rig.serve(gate)
    held = asyncio.ensure_future(rig.channel(endpoint).unary(UNARY, b"", TIMEOUT_S))
    call = rig.grpc_channel(endpoint).stream_stream(STREAM)()
    await call.write(b"hello")
    assert await call.read() == b"hello"
    await soon(gate.began.get())
    await soon(rig.servers[0].stop(0.05))
    with pytest.raises(Unavailable, match="the server stopped"):
        await held
    assert await call.code() is grpc.StatusCode.UNAVAILABLE
    assert gate.cancelled.is_set()
    assert gate.unwound.is_set()


async def test_stop_may_be_called_before_start_twice_and_by_two(rig: Rig) -> None:
    await rig.serve()
    server = rig.servers[0]
    await asyncio.gather(server.stop(0.0), server.stop(1.0))
    await server.stop(0.0)


async def test_a_cancelled_rpc_that_never_began_is_nobodys_problem(rig: Rig) -> None:
    endpoint = await rig.serve()
    channel = rig.grpc_channel(endpoint)
    for _ in range(200):
        channel.unary_unary(UNARY)(b"x" * 1000).cancel()
    assert (await rig.channel(endpoint).unary(UNARY, b"fine", TIMEOUT_S)).response == b"fine"


async def _one_life(rig: Rig) -> None:
    gate = Gate()
    endpoint = await rig.serve(gate, echo_stream)
    channel = AsyncChannel(endpoint)
    raw: Any = grpc.aio.insecure_channel(endpoint)
    gate.opened.set()
    await asyncio.gather(*(channel.unary(UNARY, b"x", TIMEOUT_S) for _ in range(20)))
    gate.opened.clear()
    call = raw.stream_stream(STREAM)()
    await call.write(b"x")
    await call.read()
    call.cancel()
    hanging = raw.unary_unary(UNARY)(b"")
    while not gate.began.empty():
        gate.began.get_nowait()
    await soon(gate.began.get())
    hanging.cancel()
    await soon(gate.cancelled.wait())
    await channel.close()
    await raw.close()
    await soon(rig.servers.pop().stop(TIMEOUT_S))


async def test_nothing_is_left_behind(rig: Rig) -> None:
    lives = 12
    # grpc core builds its own pools during the first lives.
    for _ in range(3):
        await _one_life(rig)
    gc.collect()
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    num_fds, num_native = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    for _ in range(lives):
        await _one_life(rig)
    gc.collect()
    assert asyncio.all_tasks() == tasks
    assert {thread.name for thread in set(threading.enumerate()) - threads if thread.name.startswith("tensorway")} == set()
    # One of each per life would show; core closes some of its own a moment later.
    assert len(os.listdir("/proc/self/fd")) - num_fds < lives // 2
    assert len(os.listdir("/proc/self/task")) - num_native < lives // 2

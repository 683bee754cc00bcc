"""How long, and how many, a server hears out whom it refuses."""

from __future__ import annotations

import asyncio

from tensorway.errors import Unavailable
from tensorway.transport.listening import MAX_HEARD_OUT, Routes


async def test_no_more_than_a_hundred_are_heard_out_at_once() -> None:
    routes, message = Routes(), asyncio.Event()
    num_read = 0

    async def read() -> bytes:
        nonlocal num_read
        num_read += 1
        await message.wait()
        return b"first"

    async with asyncio.TaskGroup() as tasks:
        for _ in range(MAX_HEARD_OUT):
            tasks.create_task(routes.hear_out(read))
        await asyncio.sleep(0)
        assert num_read == routes.num_heard_out == MAX_HEARD_OUT
        await routes.hear_out(read)
        assert num_read == MAX_HEARD_OUT
        message.set()
    assert routes.num_heard_out == 0
    await routes.hear_out(read)
    assert num_read == MAX_HEARD_OUT + 1


async def test_silence_and_a_client_that_goes_end_it() -> None:
    routes = Routes()

    async def gone() -> bytes:
        raise Unavailable("the client has gone")

    async def silent() -> bytes:
        await asyncio.Event().wait()
        return b""

    await routes.hear_out(gone)
    async with asyncio.timeout(30.0):
        await routes.hear_out(silent)
    assert routes.num_heard_out == 0

"""Servers of both implementations for the transport's contract tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest

from tensorway.transport import AsyncChannel, create_server
from tensorway.transport.port import Call, Server, ServerOptions, Stream, StreamHandler, UnaryHandler

IMPLEMENTATIONS = ("completion-queue", "aio")
#: Links over a local socket: the third way on which the link's suite runs.
LOCAL = "local"
UNARY = "/test.Service/Unary"
STREAM = "/test.Service/Stream"
TIMEOUT_S = 30.0


async def echo(request: bytes, call: Call) -> bytes:
    return request


async def echo_stream(stream: Stream) -> None:
    while (message := await stream.read()) is not None:
        await stream.write(message)


class Rig:
    """Starts servers and opens channels, and lets go of all of them at the end of the test."""

    def __init__(self, implementation: str, stack: AsyncExitStack) -> None:
        #: Whether links take a local socket; the server beside it is then the default one.
        self.is_local = implementation == LOCAL
        self.implementation = IMPLEMENTATIONS[0] if self.is_local else implementation
        self._stack = stack
        self.servers: list[Server] = []

    async def serve(
        self,
        unary: UnaryHandler = echo,
        stream: StreamHandler = echo_stream,
        *,
        endpoint: str = "127.0.0.1:0",
        max_message_bytes: int = 1 << 20,
        max_concurrent_rpcs: int = 0,
        prepare: Callable[[Server], None] | None = None,
    ) -> str:
        server = create_server(ServerOptions(endpoint, self.implementation, max_message_bytes, max_concurrent_rpcs))
        server.add_unary(UNARY, unary)
        server.add_stream(STREAM, stream)
        if prepare is not None:
            prepare(server)
        bound = await server.start()
        self.servers.append(server)
        self._stack.push_async_callback(server.stop, 0.0)
        return bound

    def at_end(self, close: Callable[[], Awaitable[object]]) -> None:
        """Calls `close` when the test is over."""
        self._stack.push_async_callback(close)

    def channel(self, endpoint: str) -> AsyncChannel:
        channel = AsyncChannel(endpoint)
        self._stack.push_async_callback(channel.close)
        return channel

    def grpc_channel(self, endpoint: str, compression: grpc.Compression | None = None) -> Any:
        channel: Any = grpc.aio.insecure_channel(endpoint, compression=compression)
        self._stack.push_async_callback(channel.close)
        return channel


@pytest.fixture(params=IMPLEMENTATIONS)
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        yield Rig(request.param, stack)


class Gate:
    """A unary handler that says when it began, waits to be opened, and remembers how it ended."""

    def __init__(self) -> None:
        self.began: asyncio.Queue[Call] = asyncio.Queue()
        self.opened = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.unwound = asyncio.Event()

    async def __call__(self, request: bytes, call: Call) -> bytes:
        call.on_cancel(self.cancelled.set)
        await self.began.put(call)
        try:
            await self.opened.wait()
        finally:
            self.unwound.set()
        return request


async def soon(awaitable: Awaitable[object]) -> object:
    """Waits, with a limit that only a hang reaches."""
    return await asyncio.wait_for(awaitable, TIMEOUT_S)

"""A link's wire on grpc.aio."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from tensorway.errors import Unavailable
from tensorway.tls import ChannelTls
from tensorway.transport.credentials import aio_channel
from tensorway.transport.link_wire import OPEN, WireEvents, wire_arguments
from tensorway.transport.rich_status import decode_error


class AioWire:
    """See `tensorway.transport.link_wire.Wire`."""

    def __init__(self, endpoint: str, max_message_bytes: int, tls: ChannelTls | None = None) -> None:
        self._tls = tls
        self._endpoint = endpoint
        self._max_message_bytes = max_message_bytes
        self._message: bytes | None = None
        self._wake_up: asyncio.Future[None] | None = None

    async def run(self, events: WireEvents) -> None:
        """See the port."""
        channel = aio_channel(self._endpoint, self._tls, wire_arguments(self._max_message_bytes))
        call: Any = channel.stream_stream(OPEN)()
        writer = asyncio.ensure_future(self._write(call, events))
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                events.on_message(message)
            if await call.code() is not grpc.StatusCode.OK:
                trailers = dict(await call.trailing_metadata() or ())
                raise decode_error((await call.code()).value[0], await call.details() or "", trailers)
        except grpc.aio.AioRpcError as error:
            raise decode_error(error.code().value[0], error.details() or "", dict(error.trailing_metadata() or ())) from error
        finally:
            call.cancel()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            await channel.close()
            # grpc.aio waits for a call that is being set up in a task of its own, and may swallow a cancellation on the way.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise asyncio.CancelledError

    def write(self, message: bytes) -> None:
        """See the port."""
        self._message = message
        if self._wake_up is not None and not self._wake_up.done():
            self._wake_up.set_result(None)

    async def _write(self, call: Any, events: WireEvents) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while self._message is None:
                self._wake_up = loop.create_future()
                await self._wake_up
            message, self._message = self._message, None
            try:
                await call.write(message)
            except (grpc.aio.BaseError, asyncio.InvalidStateError, grpc.RpcError) as error:
                # The reader learns the status of a broken stream; a writer has no more to say.
                raise Unavailable(f"the stream to {self._endpoint} takes no more messages") from error
            events.on_written()

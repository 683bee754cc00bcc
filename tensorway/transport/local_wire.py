"""A link's wire on a local socket: the side that opens it."""

from __future__ import annotations

import asyncio
import socket
from typing import Final

from tensorway.errors import InvalidRequest, TensorwayError, Unavailable
from tensorway.transport.link_wire import KEEPALIVE_TIME_MS, KEEPALIVE_TIMEOUT_MS, WireEvents
from tensorway.transport.local_socket import MessageProtocol

_SIGN_OF_LIFE: Final = b""


class LocalWire:
    """See `tensorway.transport.link_wire.Wire`. Owns `connection`."""

    def __init__(self, connection: socket.socket, endpoint: str, max_message_bytes: int) -> None:
        self._connection = connection
        self._endpoint = endpoint
        self._max_message_bytes = max_message_bytes
        self._protocol: _Opened | None = None

    async def run(self, events: WireEvents) -> None:
        """See the port."""
        loop = asyncio.get_running_loop()
        protocol = self._protocol = _Opened(events, self._max_message_bytes, loop)
        try:
            await loop.create_unix_connection(lambda: protocol, sock=self._connection)
            await self._watch(protocol)
        except OSError as error:
            raise Unavailable(f"{self._endpoint}: {error}") from error
        finally:
            protocol.close()
            if protocol.ended.done():
                protocol.ended.exception()  # seen, whoever cancelled this

    async def _watch(self, protocol: _Opened) -> None:
        """Waits for the end, and asks for signs of life; a peer that gives none is gone, whatever the kernel says."""
        while True:
            try:
                async with asyncio.timeout(KEEPALIVE_TIME_MS / 1e3):
                    await asyncio.shield(protocol.ended)
                return
            except TimeoutError:
                pass
            if protocol.is_quiet:
                silent_s = (KEEPALIVE_TIME_MS + KEEPALIVE_TIMEOUT_MS) / 1e3
                raise Unavailable(f"{self._endpoint} has given no sign of life for {silent_s:.0f} s")
            protocol.ask()

    def write(self, message: bytes) -> None:
        """See the port."""
        if self._protocol is not None:
            self._protocol.write(message)


class _Opened(MessageProtocol):
    """The connection."""

    def __init__(self, events: WireEvents, max_message_bytes: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(max_message_bytes)
        self._events = events
        self._loop = loop
        self._owes_written = False
        self._num_unanswered = 0
        #: Resolved when the connection is over; with an error where the peer did not mean it.
        self.ended: asyncio.Future[None] = loop.create_future()

    @property
    def is_quiet(self) -> bool:
        """True once the peer has left a sign of life unanswered for the whole time it has."""
        return self._num_unanswered * KEEPALIVE_TIME_MS >= KEEPALIVE_TIMEOUT_MS

    def ask(self) -> None:
        """Asks for a sign of life."""
        self._num_unanswered += 1
        if not self._is_paused:
            self.send(_SIGN_OF_LIFE)

    def write(self, message: bytes) -> None:
        """Sends one message, and says so as soon as the socket takes more."""
        if self._transport is None or self._transport.is_closing():
            return  # the end is on its way to the owner
        self.send(message)
        if self._is_paused:
            self._owes_written = True
        else:
            self._loop.call_soon(self._written)

    def message_received(self, message: bytes | bytearray) -> None:
        self._num_unanswered = 0
        self._events.on_message(message)

    def broken(self, error: InvalidRequest) -> None:
        self._end(error)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._owes_written:
            self._owes_written = False
            self._events.on_written()

    def eof_received(self) -> bool:
        return False  # the peer is done: close

    def connection_lost(self, error: Exception | None) -> None:
        self._end(None if error is None else Unavailable(f"the local link broke: {error}"))

    def _written(self) -> None:
        if not self.ended.done():
            self._events.on_written()

    def _end(self, error: TensorwayError | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)

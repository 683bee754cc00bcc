"""The accepting side of local links: each connection as the Stream that a gRPC link would be."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from tensorway.deadline import Deadline
from tensorway.errors import Cancelled, InvalidRequest, TensorwayError
from tensorway.transport.local_socket import MessageProtocol, is_same_user
from tensorway.transport.port import StreamHandler

_LOG = logging.getLogger(__name__)
#: Messages that may wait to be read before the connection is read no further.
_MAX_UNREAD: Final = 16


class LocalListener:
    """Accepts local links on a listening socket and runs `handler` for each, in tasks that it owns."""

    def __init__(self, listener: socket.socket, handler: StreamHandler, max_message_bytes: int) -> None:
        self._listener = listener
        self._handler = handler
        self._max_message_bytes = max_message_bytes
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: LocalStream(self._max_message_bytes, self._accepted), sock=self._listener)

    async def stop(self) -> None:
        """Accepts nothing more, and ends the links that are left."""
        if self._server is not None:
            self._server.close()
            self._server = None
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accepted(self, stream: LocalStream) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(stream), name="local link")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, stream: LocalStream) -> None:
        try:
            await self._handler(stream)
        except TensorwayError as error:
            _LOG.debug("a local link ended: %s", error)
        except Exception:  # noqa: BLE001 - one link ends by a bug; the others go on
            _LOG.exception("a local link's handler raised")
        finally:
            stream.end()


class LocalStream(MessageProtocol):
    """See `tensorway.transport.port.Stream`."""

    method: Final = "/tensorway.v1.LinkService/Open"
    metadata: Mapping[str, str | bytes] = {}
    deadline: Deadline | None = None
    peer: Final = "local"
    #: A local link needs no certificate: it is of the same user, who could read this process's key.
    peer_names: tuple[str, ...] = ()

    def __init__(self, max_message_bytes: int, on_accepted: Callable[[LocalStream], None]) -> None:
        super().__init__(max_message_bytes)
        self._on_accepted = on_accepted
        self._unread: deque[bytes | bytearray] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._has_ended = False
        self._error: InvalidRequest | None = None
        self._on_cancel: list[Callable[[], None]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if is_same_user(transport.get_extra_info("socket")):
            self._on_accepted(self)
        else:
            _LOG.warning("a process of another user tried to open a local link")
            self.close()

    def set_trailers(self, trailers: Sequence[tuple[str, str | bytes]]) -> None:
        """A local link has none."""

    def on_cancel(self, callback: Callable[[], None]) -> None:
        self._on_cancel.append(callback)

    async def read(self) -> bytes | None:
        while not self._unread:
            if self._error is not None:
                raise self._error
            if self._has_ended:
                return None
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        message = self._unread.popleft()
        if len(self._unread) == _MAX_UNREAD - 1 and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
        return message  # type: ignore[return-value]  # a large one is a bytearray: it reads like bytes

    async def write(self, message: bytes) -> None:
        while self._is_paused and not self._has_ended:
            self._writable = asyncio.get_running_loop().create_future()
            await self._writable
        if self._has_ended or self._transport is None or self._transport.is_closing():
            raise Cancelled("the peer has closed the local link")
        self.send(message)

    def offer(self, message: bytes) -> bool:
        """See the port."""
        if self._is_paused or self._has_ended or self._transport is None or self._transport.is_closing():
            return False
        self.send(message)
        return True

    def end(self) -> None:
        """Closes once what was written has left."""
        if self._transport is not None:
            self._transport.close()

    def message_received(self, message: bytes | bytearray) -> None:
        if not message:
            if not self._is_paused:
                self.send(b"")  # a sign of life for a sign of life
            return
        self._unread.append(message)
        if len(self._unread) == _MAX_UNREAD and self._transport is not None:
            self._transport.pause_reading()
        _wake(self._reader)

    def broken(self, error: InvalidRequest) -> None:
        self._error = error
        _wake(self._reader)
        self.close()

    def resume_writing(self) -> None:
        super().resume_writing()
        _wake(self._writable)

    def connection_lost(self, error: Exception | None) -> None:
        self._has_ended = True
        _wake(self._reader)
        _wake(self._writable)
        for callback in self._on_cancel:
            callback()


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)

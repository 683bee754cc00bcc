"""Links between services of one machine: the same messages over a Unix socket instead of a gRPC stream.

A gRPC message crosses three threads on each side, which is most of what a small request costs. Where both services live in one network
namespace, a link takes the short way: an abstract Unix socket (unix(7)) named after the gRPC endpoint, so that whoever can dial the
endpoint finds it and nobody else does; in another namespace or on another machine the name does not exist and the link is a gRPC stream.
The kernel tells each side who the other is: only processes of the same user (or root) may link.

A message travels as its length, 4 bytes little-endian, and its bytes. A message of no bytes is a sign of life: the side that opened the
link sends one now and then, and the other returns it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from abc import ABC, abstractmethod
from typing import Final, cast

from tensorway.errors import InvalidRequest, Unavailable

_LENGTH: Final = struct.Struct("<I")
_CREDENTIALS: Final = struct.Struct("3i")
#: Bytes that may wait in the transport before writing pauses.
_HIGH_WATER_BYTES: Final = 1 << 20


def local_address(endpoint: str) -> str:
    """The abstract socket that belongs to a gRPC endpoint."""
    return f"\0tensorway/link/{endpoint}"


def listen_local(endpoint: str) -> socket.socket | None:
    """A listening socket for links to `endpoint`; None where another process holds the name, or it is too long (107 bytes)."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.bind(local_address(endpoint))
        listener.listen(256)
    except OSError:
        listener.close()
        return None
    return listener


def connect_local(endpoint: str) -> socket.socket | None:
    """A connection to a service of this machine that listens for links to `endpoint`, None where there is none (of this user)."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        connection.connect(local_address(endpoint))
        if is_same_user(connection):
            return connection
    except OSError:
        pass  # nobody listens here by that name: the link will be a gRPC stream
    connection.close()
    return None


def is_same_user(connection: socket.socket) -> bool:
    """Whether the peer's process runs as this user, or as root; the kernel's word (SO_PEERCRED)."""
    _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return uid in (os.getuid(), 0)


class MessageProtocol(asyncio.Protocol, ABC):
    """Cuts the byte stream into messages. Subclasses say what to do with one, and learn when writing may go on and when it is over."""

    def __init__(self, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes
        self._transport: asyncio.Transport | None = None
        #: What came and is not cut yet, when no large message is being filled.
        self._rest = b""
        #: A message larger than what came at once, and how much of it is there.
        self._large: bytearray | None = None
        self._filled = 0
        self._is_paused = False

    @abstractmethod
    def message_received(self, message: bytes | bytearray) -> None:
        """Raises InvalidRequest for bytes that end the connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(_HIGH_WATER_BYTES)

    def send(self, message: bytes) -> None:
        """Queues one message."""
        if self._transport is None or self._transport.is_closing():
            raise Unavailable("the local link is closed")
        self._transport.writelines((_LENGTH.pack(len(message)), message))

    def close(self) -> None:
        """Drops the connection and what it holds."""
        if self._transport is not None:
            self._transport.abort()

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False

    def data_received(self, data: bytes) -> None:
        try:
            self._cut(data)
        except InvalidRequest as error:
            self.broken(error)

    @abstractmethod
    def broken(self, error: InvalidRequest) -> None:
        """The peer sent what is no message."""

    def _cut(self, data: bytes) -> None:
        offset = 0
        if self._large is not None:
            offset = self._fill(data, 0)
        elif self._rest:
            data, self._rest = self._rest + data, b""
        end = len(data)
        while end - offset >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, offset)
            if length > self._max_message_bytes:
                raise InvalidRequest(f"a message claims {length} bytes, more than {self._max_message_bytes}", field="frames")
            start = offset + _LENGTH.size
            if start + length > end:
                if length > len(data):
                    # Filled in place: adding piece to piece would copy a large message over and over.
                    self._large, self._filled = bytearray(length), 0
                    self._fill(data, start)
                    return
                break
            self.message_received(data[start : start + length])
            offset = start + length
        if self._large is None:
            self._rest = data[offset:]

    def _fill(self, data: bytes, offset: int) -> int:
        """Moves bytes into the large message, and hands it on once it is whole; returns where in `data` the next message starts."""
        large = self._large
        assert large is not None
        end = min(len(data), offset + len(large) - self._filled)
        large[self._filled : self._filled + end - offset] = memoryview(data)[offset:end]
        self._filled += end - offset
        if self._filled == len(large):
            self._large = None
            self.message_received(large)
        return end

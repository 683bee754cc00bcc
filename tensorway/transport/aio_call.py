"""One RPC of the portable server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import grpc

from tensorway.deadline import Deadline
from tensorway.transport.callbacks import call_guarded
from tensorway.transport.credentials import peer_names
from tensorway.transport.listening import gone, too_large
from tensorway.transport.port import ServerOptions

#: grpc.aio raises these where it touches an RPC that ended under its hands.
_GONE: Final = (grpc.aio.BaseError, grpc.aio.AbortError)


class AioCall:
    """See `tensorway.transport.port.Call`."""

    __slots__ = ("_callbacks", "_is_cancelled", "_metadata", "_task", "context", "has_read", "is_stopped", "method", "trailers")

    def __init__(self, context: Any, method: str) -> None:
        self.context: Final = context
        self.method: Final = method
        self.trailers: tuple[tuple[str, str | bytes], ...] = ()
        #: True once the server's stop cancelled the handler.
        self.is_stopped = False
        #: True once the handler has asked for a message.
        self.has_read = False
        self._is_cancelled = False
        self._task = asyncio.current_task()
        self._callbacks: list[Callable[[], None]] = []
        self._metadata: dict[str, str | bytes] | None = None

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        if self._metadata is None:
            self._metadata = dict(self.context.invocation_metadata())
        return self._metadata

    @property
    def deadline(self) -> Deadline | None:
        remaining_s: float | None = self.context.time_remaining()
        return None if remaining_s is None else Deadline.after(remaining_s)

    @property
    def peer(self) -> str:
        peer: str = self.context.peer()
        return peer

    @property
    def peer_names(self) -> tuple[str, ...]:
        return peer_names(self.context.auth_context())

    async def read(self) -> bytes | None:
        """The next message; None after the client's last."""
        self.has_read = True
        try:
            message = await self.context.read()
        except _GONE as error:
            raise gone() from error
        return None if message is grpc.aio.EOF else message

    def set_trailers(self, trailers: Sequence[tuple[str, str | bytes]]) -> None:
        self.trailers = tuple(trailers)
        self.context.set_trailing_metadata(self.trailers)

    def on_cancel(self, callback: Callable[[], None]) -> None:
        if self._is_cancelled:
            asyncio.get_running_loop().call_soon(callback)
        else:
            self._callbacks.append(callback)

    def run_callbacks(self) -> None:
        """Runs the on_cancel callbacks, once."""
        self._is_cancelled = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            call_guarded(f"{self.method}: an on_cancel callback", callback)

    def cancel_at_stop(self) -> None:
        """The server stops: ends the handler, whose client still reads a status."""
        self.is_stopped = True
        if self._task is not None:
            self._task.cancel()


class AioStream(AioCall):
    """See `tensorway.transport.port.Stream`."""

    __slots__ = ("_options",)

    def __init__(self, context: Any, method: str, options: ServerOptions) -> None:
        super().__init__(context, method)
        self._options = options

    async def write(self, message: bytes) -> None:
        """See the port."""
        if len(message) > self._options.max_message_bytes:
            raise too_large(len(message), self._options)
        try:
            await self.context.write(message)
        except _GONE as error:
            raise gone() from error

    def offer(self, message: bytes) -> bool:
        """See the port: grpc.aio takes nothing without a wait."""
        return False

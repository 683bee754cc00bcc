"""A streamed call to a service itself, as an exchange: so that each hop can be called alone."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from tensorway.deadline import Deadline
from tensorway.errors import InternalError, TensorwayError
from tensorway.transport.port import TOKEN_CREDIT, Payload, Stream


class StreamedExchange:
    """See `tensorway.transport.port.Exchange`. A message that was written is one more that may be pushed."""

    __slots__ = ("_credit", "_error", "_is_over", "_messages", "_on_cancel", "_on_credit", "_wake", "deadline", "head", "payload")

    def __init__(self, head: bytes, deadline: Deadline) -> None:
        self.head: Final = head
        self.payload: Final[Payload] = ()
        self.deadline: Final = deadline
        self._credit = TOKEN_CREDIT
        self._messages: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._error: TensorwayError | None = None
        self._is_over = False
        self._on_cancel: list[Callable[[], None]] = []
        self._on_credit: list[Callable[[], None]] = []

    @property
    def credit(self) -> int:
        return self._credit

    def push(self, head: bytes) -> None:
        if self._is_over:
            return
        if not self._credit:
            raise InternalError("a token is pushed to a call that has no credit")
        self._credit -= 1
        self._messages.append(head)
        self._wake.set()

    def on_credit(self, callback: Callable[[], None]) -> None:
        self._on_credit.append(callback)

    def on_cancel(self, callback: Callable[[], None]) -> None:
        self._on_cancel.append(callback)

    def reply(self, head: bytes, payload: Payload) -> None:
        self._is_over = True
        self._wake.set()

    def fail(self, error: TensorwayError) -> None:
        if not self._is_over:
            self._is_over, self._error = True, error
            self._wake.set()

    def cancel(self) -> None:
        """The caller has gone."""
        if not self._is_over:
            self._is_over = True
            self._wake.set()
            for callback in self._on_cancel:
                callback()

    async def relay(self, stream: Stream) -> None:
        """Writes what is pushed until the exchange is answered. Raises the error that it was answered with, and Cancelled once the caller
        has gone."""
        while True:
            while self._messages:
                await stream.write(self._messages.popleft())
                self._credit += 1
                if self._credit == 1 and not self._is_over:
                    for callback in self._on_credit:
                        callback()
            if self._is_over and not self._messages:
                break
            self._wake.clear()
            await self._wake.wait()
        if self._error is not None:
            raise self._error

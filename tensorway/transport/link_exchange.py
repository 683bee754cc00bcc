"""One request as the accepting side of a link sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from tensorway.deadline import Deadline
from tensorway.errors import InternalError, InvalidRequest, TensorwayError
from tensorway.transport.callbacks import call_guarded
from tensorway.transport.error_detail import encode_detail
from tensorway.transport.frames import ERROR, RESPONSE
from tensorway.transport.port import TOKEN_CREDIT, Payload


class AnswerTaker(Protocol):
    """The link that an exchange came on."""

    def take_answer(self, kind: int, id: int, head: bytes, payload: Payload) -> None: ...

    def take_token(self, id: int, head: bytes) -> None: ...


class LinkExchange:
    """See `tensorway.transport.port.Exchange`."""

    __slots__ = (
        "_callbacks", "_credit", "_credit_callbacks", "_is_cancelled", "_is_over", "_link", "deadline", "head", "id", "payload",
    )  # fmt: skip

    def __init__(self, link: AnswerTaker, id: int, head: bytes, payload: Payload, deadline: Deadline) -> None:
        self._link = link
        self.id: Final = id
        self.head: Final = head
        self.payload: Final = payload
        self.deadline: Final = deadline
        self._callbacks: list[Callable[[], None]] = []
        self._credit_callbacks: list[Callable[[], None]] | None = None
        self._credit = TOKEN_CREDIT
        self._is_over = False
        self._is_cancelled = False

    def reply(self, head: bytes, payload: Payload) -> None:
        """See the port."""
        self._answer(RESPONSE, head, payload)

    def fail(self, error: TensorwayError) -> None:
        """See the port."""
        self._answer(ERROR, encode_detail(error), ())

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """See the port. Where the peer has gone already, `callback` runs in the loop's next turn."""
        if self._is_cancelled:
            asyncio.get_running_loop().call_soon(callback)
        elif not self._is_over:
            self._callbacks.append(callback)

    @property
    def credit(self) -> int:
        """See the port."""
        return self._credit

    def push(self, head: bytes) -> None:
        """See the port."""
        if self._is_over:
            return
        if not self._credit:
            raise InternalError(f"a token is pushed to exchange {self.id}, which has no credit")
        self._credit -= 1
        self._link.take_token(self.id, head)

    def on_credit(self, callback: Callable[[], None]) -> None:
        """See the port."""
        if self._is_over:
            return
        if self._credit_callbacks is None:
            self._credit_callbacks = [callback]
        else:
            self._credit_callbacks.append(callback)

    def add_credit(self, num_tokens: int) -> None:
        """Called by the link: the peer grants so many more tokens. Raises InvalidRequest where it grants more than it was sent."""
        had_none = not self._credit
        if num_tokens > TOKEN_CREDIT - self._credit:
            raise InvalidRequest(f"{num_tokens} tokens are granted to request {self.id}, more than it was sent", field="frames")
        self._credit += num_tokens
        if had_none:
            for callback in tuple(self._credit_callbacks or ()):
                call_guarded("an on_credit callback of an exchange", callback)

    def cancel(self) -> None:
        """Called by the link: the peer no longer wants an answer."""
        if self._is_over:
            return
        self._is_over = self._is_cancelled = True
        self._credit_callbacks = None
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            call_guarded("an on_cancel callback of an exchange", callback)

    def _answer(self, kind: int, head: bytes, payload: Payload) -> None:
        if self._is_over:
            return
        self._is_over = True
        # Callbacks hold on to whoever works on the request: an answered one needs them no more.
        self._callbacks = []
        self._credit_callbacks = None
        self._link.take_answer(kind, self.id, head, payload)

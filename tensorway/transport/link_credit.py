"""The credit of token streams on the side of a link that opened it: what the peer may still send, and what is granted. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from tensorway.errors import InternalError, InvalidRequest
from tensorway.transport.port import TOKEN_CREDIT

#: Grants that have come together leave by themselves: early enough that the peer never waits for a reader that keeps up.
_DUE: Final = TOKEN_CREDIT // 2


class _Window:
    """One stream. What may come, what waits to be granted, and what the reader still holds, add up to TOKEN_CREDIT."""

    __slots__ = ("num_allowed", "num_gathered", "on_token")

    def __init__(self, on_token: Callable[[bytes], None]) -> None:
        self.on_token: Final = on_token
        self.num_allowed = TOKEN_CREDIT
        self.num_gathered = 0


class CreditLedger:
    """The streams of one link, by request id. A request is entered with its first token."""

    __slots__ = ("_gathering", "_windows")

    def __init__(self) -> None:
        self._windows: dict[int, _Window] = {}
        #: Ids of streams with grants that have not left; in order.
        self._gathering: dict[int, None] = {}

    def take(self, id: int, sink: object) -> Callable[[bytes], None]:
        """Counts one token for `sink` and returns what is to be told of it. Raises InvalidRequest where the sink takes no tokens or the
        peer had no credit left."""
        window = self._windows.get(id)
        if window is None:
            on_token = getattr(sink, "on_token", None)
            if on_token is None:
                raise InvalidRequest(f"a token came for request {id}, which is not answered with tokens", field="frames.id")
            window = self._windows[id] = _Window(on_token)
        if not window.num_allowed:
            raise InvalidRequest(f"request {id} was answered with more tokens than were granted", field="frames.id")
        window.num_allowed -= 1
        return window.on_token

    def grant(self, id: int, num_tokens: int) -> bool:
        """Gathers a grant, and says whether so much has come together that it should leave. Raises InternalError where more is granted
        than was received: the peer would take that for a broken link."""
        window = self._windows.get(id)
        if window is None:
            return False
        if not 0 <= num_tokens <= TOKEN_CREDIT - window.num_allowed - window.num_gathered:
            raise InternalError(f"{num_tokens} tokens are granted to request {id}, more than the reader holds")
        window.num_gathered += num_tokens
        if num_tokens:
            self._gathering[id] = None
        return window.num_gathered >= _DUE

    def gathered(self) -> Iterator[tuple[int, int]]:
        """(id, tokens) of all grants that have not left; they count as sent."""
        while self._gathering:
            id, _ = self._gathering.popitem()
            window = self._windows[id]
            num_tokens, window.num_gathered = window.num_gathered, 0
            window.num_allowed += num_tokens
            yield id, num_tokens

    def forget(self, id: int) -> None:
        """The request is over."""
        if self._windows.pop(id, None) is not None:
            self._gathering.pop(id, None)

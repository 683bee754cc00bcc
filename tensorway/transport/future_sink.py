"""A sink of a link for whoever waits for the outcome of one request."""

from __future__ import annotations

import asyncio
from typing import Final

from tensorway.errors import TensorwayError
from tensorway.transport.port import Payload, Reply


class FutureSink:
    """Turns the outcome of a request into a future's."""

    __slots__ = ("outcome",)

    def __init__(self, outcome: asyncio.Future[Reply]) -> None:
        self.outcome: Final = outcome

    def on_reply(self, head: bytes, payload: Payload) -> None:
        if not self.outcome.done():
            self.outcome.set_result(Reply(head, payload))

    def on_error(self, error: TensorwayError) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)

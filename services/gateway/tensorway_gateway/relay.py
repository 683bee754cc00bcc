"""Carries the messages of one stream from a link to its client, unparsed."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

from tensorway.deadline import Deadline
from tensorway.errors import TensorwayError
from tensorway.transport.port import Payload
from tensorway_gateway.upstream import Orchestrator

#: Sends one serialised GenerateResponse to the client; returns when the next may be sent.
Write = Callable[[bytes], Awaitable[None]]


class RelayLog:
    """What a stream's client was sent, over all attempts: enough to go on after a loss. `keeps_all` False keeps the last message only."""

    __slots__ = ("_keeps_all", "first_delta_s", "is_writing", "messages", "num_messages")

    def __init__(self, *, keeps_all: bool) -> None:
        self._keeps_all = keeps_all
        self.messages: list[bytes] = []
        self.num_messages = 0
        #: When the message after `started` had been sent, seconds on `time.monotonic()`.
        self.first_delta_s: float | None = None
        #: Whether the client is being waited for.
        self.is_writing = False

    def add(self, message: bytes) -> None:
        if not self._keeps_all:
            self.messages.clear()
        self.messages.append(message)
        self.num_messages += 1


class _Arriving:
    """The sink of one attempt. Holds at most the link's credit of messages."""

    __slots__ = ("_waiter", "error", "is_over", "messages")

    def __init__(self) -> None:
        self.messages: deque[bytes] = deque()
        self.is_over = False
        self.error: TensorwayError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def on_token(self, head: bytes) -> None:
        self.messages.append(head)
        self._wake()

    def on_reply(self, head: bytes, payload: Payload) -> None:
        self.is_over = True
        self._wake()

    def on_error(self, error: TensorwayError) -> None:
        self.is_over, self.error = True, error
        self._wake()

    async def wait(self) -> None:
        """Returns once there is news."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def relay(orchestrator: Orchestrator, head: bytes, deadline: Deadline, log: RelayLog, write: Write) -> None:
    """One attempt: sends the request, and its messages to the client until the end of the stream. What arrived before an error is sent
    before it is raised. Grants the link a message for each that the client took: a slow client slows its own stream and no other.

    Raises the orchestrator's error, Unavailable where its link breaks, and what `write` raises; cancels at the orchestrator where it ends
    early. Enforces no deadline.
    """
    sink, link = _Arriving(), orchestrator.link
    id = link.send(head, (), deadline, sink)
    orchestrator.begin()
    messages = sink.messages
    try:
        while True:
            while messages:
                message = messages.popleft()
                log.add(message)
                log.is_writing = True
                await write(message)
                log.is_writing = False
                if log.first_delta_s is None and log.num_messages > 1:
                    log.first_delta_s = time.monotonic()
                link.grant(id, 1)
            if not sink.is_over:
                await sink.wait()
            elif sink.error is None:
                return
            else:
                raise sink.error
    finally:
        orchestrator.end()
        if not sink.is_over:
            link.cancel(id)

"""Carries the messages of one stream from a link to its client, unparsed."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Final, Protocol

from tensorway.deadline import Deadline
from tensorway.errors import TensorwayError
from tensorway.transport.port import TOKEN_CREDIT, LinkClient, Payload
from tensorway_gateway.upstream import Orchestrator

#: So many messages that a client took at once are granted together: a grant each would cost more than it hastens.
_GRANT: Final = TOKEN_CREDIT // 2


class Reader(Protocol):
    """Where a stream's messages go: serialised GenerateResponses. A Stream is one."""

    async def write(self, message: bytes) -> None:
        """Sends one message; returns when the next may be sent."""

    def offer(self, message: bytes) -> bool:
        """Sends one message if that needs no waiting; False: it was not sent."""


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
        """A message is being sent."""
        if not self._keeps_all:
            self.messages.clear()
        self.messages.append(message)
        self.num_messages += 1

    def sent(self) -> None:
        """The last message has been sent."""
        if self.first_delta_s is None and self.num_messages > 1:
            self.first_delta_s = time.monotonic()


class _Relay:
    """The sink of one attempt. A message goes to the reader as it comes, unless the reader is behind: then messages wait here, at most the
    link's credit of them."""

    __slots__ = ("_link", "_log", "_num_taken", "_reader", "_waiter", "error", "id", "is_over", "messages")

    def __init__(self, link: LinkClient, log: RelayLog, reader: Reader) -> None:
        self._link = link
        self._log = log
        self._reader = reader
        #: Of the request on the link.
        self.id = 0
        self.messages: deque[bytes] = deque()
        self.is_over = False
        self.error: TensorwayError | None = None
        #: Messages that the reader took at once and that are not granted yet.
        self._num_taken = 0
        self._waiter: asyncio.Future[None] | None = None

    def on_token(self, head: bytes) -> None:
        log = self._log
        if self.messages or log.is_writing or not self._reader.offer(head):
            self.messages.append(head)
            self._wake()
            return
        log.add(head)
        if log.first_delta_s is None:
            log.sent()
        self._num_taken += 1
        if self._num_taken == _GRANT:
            self._num_taken = 0
            self._link.grant(self.id, _GRANT)

    def on_reply(self, head: bytes, payload: Payload) -> None:
        self.is_over = True
        self._wake()

    def on_error(self, error: TensorwayError) -> None:
        self.is_over, self.error = True, error
        self._wake()

    async def write_waiting(self) -> None:
        """Sends the messages that wait, and what comes meanwhile."""
        log = self._log
        while self.messages:
            message = self.messages.popleft()
            log.add(message)
            log.is_writing = True
            await self._reader.write(message)
            log.is_writing = False
            log.sent()
            self._link.grant(self.id, 1 + self._num_taken)
            self._num_taken = 0

    async def wait(self) -> None:
        """Returns once there is news."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def relay(orchestrator: Orchestrator, head: bytes, deadline: Deadline, log: RelayLog, reader: Reader) -> None:
    """One attempt: sends the request, and its messages to the client until the end of the stream. What arrived before an error is sent
    before it is raised. Grants the link a message for each that the client took: a slow client slows its own stream and no other.

    Raises the orchestrator's error, Unavailable where its link breaks, and what `reader` raises; cancels at the orchestrator where it ends
    early. Enforces no deadline.
    """
    link = orchestrator.link
    sink = _Relay(link, log, reader)
    sink.id = link.send(head, (), deadline, sink)
    orchestrator.begin()
    try:
        while True:
            await sink.write_waiting()
            if not sink.is_over:
                await sink.wait()
            elif sink.error is None:
                return
            else:
                raise sink.error
    finally:
        orchestrator.end()
        if not sink.is_over:
            link.cancel(sink.id)

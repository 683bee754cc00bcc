"""The side of a link that opens it: reconnects, matches replies to requests, and fails what is in flight when the connection breaks.

`send` only queues. What one turn of the loop queued leaves as one message as soon as no other is being written; what queues meanwhile is
the next message. No timer, no task per request.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Final

from tensorway.deadline import Deadline
from tensorway.errors import DeadlineExceeded, InternalError, InvalidRequest, MessageTooLarge, TensorwayError, Unavailable
from tensorway.transport.callbacks import call_guarded
from tensorway.transport.error_detail import decode_detail
from tensorway.transport.frames import (
    CANCEL,
    CHUNK,
    CREDIT,
    ERROR,
    GOAWAY,
    MAX_ID,
    REQUEST,
    RESPONSE,
    TOKEN,
    Frame,
    FrameKind,
    decode_message,
)
from tensorway.transport.future_sink import FutureSink
from tensorway.transport.link_credit import CreditLedger
from tensorway.transport.link_inbox import Inbox
from tensorway.transport.link_outbox import Outbox, Progress
from tensorway.transport.link_wire import Wire
from tensorway.transport.port import Payload, Reply, ReplySink

_LOG = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 2.0
#: A peer that accepts the connection but not the stream is given up after this.
_OPEN_TIMEOUT_S: Final = 5.0
_MIN_WAITING_BYTES: Final = 512 * 1024 * 1024


class StreamLinkClient:
    """See `tensorway.transport.port.LinkClient`."""

    def __init__(
        self, endpoint: str, max_message_bytes: int, new_wire: Callable[[str, int], Wire], on_change: Callable[[], None] | None = None
    ) -> None:
        self._endpoint = endpoint
        self._max_message_bytes = max_message_bytes
        #: Bytes that may wait for a peer that does not take them before it counts as lost.
        self._max_waiting_bytes = max(2 * max_message_bytes, _MIN_WAITING_BYTES)
        self._new_wire = new_wire
        self._on_change = on_change
        self._sinks: dict[int, ReplySink] = {}
        self._last_id = 0
        self._outbox = Outbox()
        self._inbox = Inbox(max_message_bytes)
        self._ledger = CreditLedger()
        self._wire: Wire | None = None
        self._is_connected = False
        self._is_writing = False
        self._is_flush_due = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connected = asyncio.Event()
        self._opening: asyncio.Timeout | None = None
        self._last_error = "it has not been tried yet"

    @property
    def endpoint(self) -> str:
        return self._endpoint

    @property
    def is_connected(self) -> bool:
        return self._is_connected

    @property
    def num_in_flight(self) -> int:
        return len(self._sinks)

    async def run(self) -> None:
        """See the port."""
        if self._loop is not None:
            raise InternalError(f"the link to {self._endpoint} runs already")
        self._loop = asyncio.get_running_loop()
        num_failures = 0
        while True:
            num_failures = 0 if await self._run_once() else num_failures + 1
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(num_failures, 10))
            # Jitter: the many peers of a service that came back do not all dial at the same instant.
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))

    async def wait_connected(self, deadline: Deadline) -> None:
        """See the port."""
        try:
            async with asyncio.timeout(deadline.remaining_s()):
                await self._connected.wait()
        except TimeoutError:
            raise Unavailable(f"no link to {self._endpoint}: {self._last_error}") from None

    def send(self, head: bytes, payload: Payload, deadline: Deadline, sink: ReplySink) -> int:
        """See the port. Also raises MessageTooLarge for a payload above the limit."""
        if not self._is_connected:
            raise Unavailable(f"no link to {self._endpoint}: {self._last_error}")
        num_bytes = sum(map(len, payload))
        if num_bytes > self._max_message_bytes:
            raise MessageTooLarge(f"the payload has {num_bytes} bytes, more than the limit of {self._max_message_bytes}")
        if self._outbox.num_bytes > self._max_waiting_bytes:
            raise Unavailable(f"{self._endpoint} does not take what is sent: {self._outbox.num_bytes} bytes wait")
        id = self._next_id()
        self._sinks[id] = sink
        self._outbox.offer(REQUEST, id, head, payload, deadline)
        self._wake()
        return id

    def grant(self, request_id: int, num_tokens: int) -> None:
        """See the port. Raises InternalError where more is granted than has come: grants are for tokens that the reader is done with."""
        if self._ledger.grant(request_id, num_tokens):
            self._offer_credit()
            self._wake()

    def cancel(self, request_id: int) -> None:
        """See the port."""
        if self._pop(request_id) is None:
            return
        self._inbox.drop(request_id, is_cancelled=False)
        if self._outbox.withdraw(request_id) is not Progress.UNSENT:
            self._outbox.offer(CANCEL, request_id)
            self._wake()

    async def call(self, head: bytes, payload: Payload, deadline: Deadline) -> Reply:
        """See the port."""
        sink = FutureSink(asyncio.get_running_loop().create_future())
        id = self.send(head, payload, deadline, sink)
        try:
            async with asyncio.timeout(deadline.remaining_s()):
                return await sink.outcome
        except TimeoutError:
            raise DeadlineExceeded(f"{self._endpoint} did not answer in time", hop=self._endpoint) from None
        finally:
            self.cancel(id)

    def on_message(self, message: bytes | bytearray) -> None:
        """Called by the wire. Raises InvalidRequest where the peer breaks the protocol."""
        if self._opening is not None:
            # The stream proved to be up: from here on it may live for as long as it can.
            self._opening.reschedule(None)
            self._opening = None
            self._is_connected = True
            self._connected.set()
            self._tell_change()
        for frame in decode_message(message):
            self._take(frame)

    def on_written(self) -> None:
        """Called by the wire: it takes the next message."""
        self._is_writing = False
        self._flush()

    async def _run_once(self) -> bool:
        """One connection, from dialling to its end; says whether it was ever up."""
        was_up = False
        self._wire = self._new_wire(self._endpoint, self._max_message_bytes)
        error: TensorwayError = Unavailable("the link was closed on this side")
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT_S) as self._opening:
                await self._wire.run(self)
            error = Unavailable("the peer closed the link")
        except TimeoutError:
            error = Unavailable(f"it did not open the link within {_OPEN_TIMEOUT_S:.0f} s")
        except InvalidRequest as broken:
            _LOG.error("the link to %s is closed: %s", self._endpoint, broken)
            error = broken
        except TensorwayError as broken:
            error = broken
        finally:
            was_up = self._opening is None
            self._break(error)
        return was_up

    def _break(self, error: TensorwayError) -> None:
        """The connection is gone: whoever waits is told at once."""
        self._wire = self._opening = None
        self._is_connected = self._is_writing = False
        self._connected.clear()
        self._last_error = error.message
        self._outbox.clear()
        self._inbox = Inbox(self._max_message_bytes)
        self._ledger = CreditLedger()
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            call_guarded("a sink of a link", sink.on_error, Unavailable(f"the link to {self._endpoint} broke: {error.message}"))
        self._tell_change()

    def _tell_change(self) -> None:
        if self._on_change is not None:
            call_guarded(f"the listener of the link to {self._endpoint}", self._on_change)

    def _take(self, frame: Frame) -> None:
        kind, id = frame.kind, frame.id
        if kind == TOKEN:
            # Tokens of a request that was cancelled may still come for a while.
            sink = self._sinks.get(id)
            if sink is not None:
                call_guarded("a sink of a link", self._ledger.take(id, sink), frame.head)
        elif kind == RESPONSE:
            if frame.has_more:
                self._inbox.begin(frame)
                if id not in self._sinks:
                    self._inbox.drop(id, is_cancelled=False)
            else:
                self._tell_reply(id, frame.head, (frame.body,) if frame.body else ())
        elif kind == CHUNK:
            arrival = self._inbox.add(frame)
            if arrival is None:
                return
            if arrival.payload is None:
                self._refuse_reply(id)
            else:
                self._tell_reply(id, arrival.first.head, arrival.payload)
        elif kind == ERROR:
            self._inbox.drop(id, is_cancelled=True)
            self._take_error(id, frame.head)
        elif kind == GOAWAY:
            self._is_connected = False
            self._connected.clear()
            self._last_error = "the peer is draining"
            self._tell_change()
        else:
            name = FrameKind(kind).name.lower()
            raise InvalidRequest(f"a {name} frame may not be sent by the side that accepted the link", field="frames")

    def _take_error(self, id: int, head: bytes) -> None:
        sink = self._pop(id)
        if sink is None:
            return
        call_guarded("a sink of a link", sink.on_error, decode_detail(head))
        if self._outbox.withdraw(id) is Progress.PARTIAL:
            # The peer refused a payload that is still leaving, and learns here that no more of it comes.
            self._outbox.offer(CANCEL, id)
            self._wake()

    def _refuse_reply(self, id: int) -> None:
        sink = self._pop(id)
        if sink is None:
            return
        call_guarded(
            "a sink of a link", sink.on_error, MessageTooLarge(f"the reply is longer than the limit of {self._max_message_bytes} bytes")
        )
        self._outbox.offer(CANCEL, id)
        self._wake()

    def _tell_reply(self, id: int, head: bytes, payload: Payload) -> None:
        sink = self._pop(id)
        if sink is not None:
            call_guarded("a sink of a link", sink.on_reply, head, payload)

    def _pop(self, id: int) -> ReplySink | None:
        """Takes the sink of a request that is over; None where there is none."""
        self._ledger.forget(id)
        return self._sinks.pop(id, None)

    def _offer_credit(self) -> None:
        for id, num_tokens in self._ledger.gathered():
            self._outbox.offer(CREDIT, id, value=num_tokens)

    def _next_id(self) -> int:
        id = self._last_id
        while True:
            id = 1 if id >= MAX_ID else id + 1
            if id not in self._sinks:
                self._last_id = id
                return id

    def _wake(self) -> None:
        if not self._is_writing and not self._is_flush_due and self._loop is not None:
            self._is_flush_due = True
            self._loop.call_soon(self._flush_due)

    def _flush_due(self) -> None:
        self._is_flush_due = False
        self._flush()

    def _flush(self) -> None:
        if self._is_writing or self._wire is None:
            return
        if self._outbox:
            self._offer_credit()
        message = self._outbox.take()
        if message is not None:
            self._is_writing = True
            self._wire.write(message)

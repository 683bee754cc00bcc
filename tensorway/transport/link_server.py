"""The accepting side of links, on top of the Server port's Stream: it runs on both server implementations.

Bounds: an unfinished inbound payload holds at most `max_message_bytes`. While more than `MAX_WAITING_BYTES` of replies wait for a peer that
reads too slowly, nothing more is read from it, so that what waits is bounded by that and the replies to requests already accepted.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from tensorway.deadline import Deadline
from tensorway.errors import Cancelled, InvalidRequest, MessageTooLarge, TensorwayError, Unavailable, as_tensorway_error
from tensorway.transport.error_detail import encode_detail
from tensorway.transport.frames import CANCEL, CHUNK, CREDIT, ERROR, GOAWAY, REQUEST, TOKEN, Frame, FrameKind, decode_message
from tensorway.transport.link_exchange import LinkExchange
from tensorway.transport.link_inbox import Inbox
from tensorway.transport.link_outbox import Outbox, Progress
from tensorway.transport.local_listener import LocalListener
from tensorway.transport.local_socket import listen_local
from tensorway.transport.port import DEFAULT_MAX_MESSAGE_BYTES, ExchangeHandler, Payload, Server, Stream

_LOG = logging.getLogger(__name__)

OPEN: Final = "/tensorway.v1.LinkService/Open"
#: Replies that may wait for a slow peer before nothing more is read from it.
MAX_WAITING_BYTES: Final = 64 * 1024 * 1024


class LinkServer:
    """Hands every request of every link to `on_exchange`. Lives in one loop."""

    def __init__(self, on_exchange: ExchangeHandler, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> None:
        self._on_exchange = on_exchange
        self._max_message_bytes = max_message_bytes
        self._links: set[_AcceptedLink] = set()
        self._is_draining = False
        self._no_links = asyncio.Event()
        self._local: LocalListener | None = None

    @property
    def num_open(self) -> int:
        """Exchanges that have not been answered."""
        return sum(link.num_open for link in self._links)

    def attach(self, server: Server) -> None:
        """Adds the link's one method to a server that has not started."""
        server.add_stream(OPEN, self._open)

    async def listen_local(self, endpoint: str) -> bool:
        """Also accepts links from this machine over a local socket named after `endpoint`, the one that peers dial. To be called before
        they learn of it. Says whether it could; where not, links go over gRPC. Needs a later `close`."""
        listener = listen_local(endpoint)
        if listener is None:
            _LOG.warning("no local socket for links to %s: they go over gRPC", endpoint)
            return False
        self._local = LocalListener(listener, self._open, self._max_message_bytes)
        await self._local.start()
        return True

    async def close(self) -> None:
        """Closes the local socket and its links at once; harmless to repeat. Links over gRPC end with their server."""
        local, self._local = self._local, None
        if local is not None:
            await local.stop()

    async def drain(self, deadline: Deadline) -> int:
        """Tells every peer to send nothing new, lets open exchanges be answered, and ends their links. Returns the number of exchanges
        that were still open at the deadline; their links stay up."""
        self._is_draining = True
        for link in tuple(self._links):
            link.send_goaway()
        if self._links:
            # Set whenever the last link ended, which may have been long ago.
            self._no_links.clear()
            try:
                await asyncio.wait_for(self._no_links.wait(), max(0.0, deadline.remaining_s()))
            except TimeoutError:
                _LOG.warning("%d exchanges are still open at the end of the drain", self.num_open)
        return self.num_open

    async def _open(self, stream: Stream) -> None:
        if self._is_draining:
            raise Unavailable("this service is draining")
        link = _AcceptedLink(stream, self._on_exchange, self._max_message_bytes)
        self._links.add(link)
        try:
            await link.serve()
        except InvalidRequest as error:
            _LOG.warning("the link from %s is closed: %s", stream.peer, error)
            raise
        finally:
            self._links.discard(link)
            if not self._links:
                self._no_links.set()


class _AcceptedLink:
    """One link."""

    __slots__ = (
        "_exchanges", "_inbox", "_is_closing", "_max_message_bytes", "_on_exchange", "_outbox", "_room", "_stream", "_wake_up",
    )  # fmt: skip

    def __init__(self, stream: Stream, on_exchange: ExchangeHandler, max_message_bytes: int) -> None:
        self._stream = stream
        self._on_exchange = on_exchange
        self._max_message_bytes = max_message_bytes
        self._outbox = Outbox()
        self._inbox = Inbox(max_message_bytes)
        self._exchanges: dict[int, LinkExchange] = {}
        #: True once nothing new is accepted: the link ends when all that is open has been answered.
        self._is_closing = False
        self._wake_up: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None

    @property
    def num_open(self) -> int:
        return len(self._exchanges)

    async def serve(self) -> None:
        """Runs the link until the peer closes it, breaks it, or it has been drained. Raises InvalidRequest for bytes that are no frames."""
        # An empty message proves to the peer that the link is up.
        await self._stream.write(b"")
        reader = asyncio.ensure_future(self._read())
        writer = asyncio.ensure_future(self._write())
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            if reader.done() and not reader.cancelled() and reader.exception() is None:
                self._is_closing = True
                self._wake()
                await asyncio.wait((writer,))
        finally:
            reader.cancel()
            writer.cancel()
            outcomes = await asyncio.gather(reader, writer, return_exceptions=True)
            self._break()
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    def send_goaway(self) -> None:
        """Accepts nothing new, and tells the peer."""
        if not self._is_closing:
            self._is_closing = True
            self._outbox.offer(GOAWAY, 0)
            self._wake()

    def take_answer(self, kind: int, id: int, head: bytes, payload: Payload) -> None:
        """Queues the answer of an exchange."""
        self._exchanges.pop(id, None)
        self._outbox.offer(kind, id, head, payload)
        self._wake()

    def take_token(self, id: int, head: bytes) -> None:
        """Queues one token of an exchange."""
        self._outbox.offer(TOKEN, id, head)
        self._wake()

    async def _read(self) -> None:
        read, outbox = self._stream.read, self._outbox
        while (message := await read()) is not None:
            for frame in decode_message(message):
                self._take(frame)
            while outbox.num_bytes > MAX_WAITING_BYTES:
                self._room = asyncio.get_running_loop().create_future()
                await self._room

    async def _write(self) -> None:
        write, take = self._stream.write, self._outbox.take
        while True:
            message = take()
            if message is not None:
                await write(message)
                if self._room is not None and not self._room.done() and self._outbox.num_bytes <= MAX_WAITING_BYTES:
                    self._room.set_result(None)
            elif self._is_closing and not self._exchanges:
                return
            else:
                self._wake_up = asyncio.get_running_loop().create_future()
                await self._wake_up

    def _wake(self) -> None:
        if self._wake_up is not None and not self._wake_up.done():
            self._wake_up.set_result(None)

    def _take(self, frame: Frame) -> None:
        kind = frame.kind
        if kind == REQUEST:
            if frame.id in self._exchanges:
                raise InvalidRequest(f"id {frame.id} is used twice", field="frames.id")
            if frame.has_more:
                self._inbox.begin(frame, Deadline.from_remaining_us(frame.value))
            else:
                self._accept(frame, (frame.body,) if frame.body else (), Deadline.from_remaining_us(frame.value))
        elif kind == CHUNK:
            arrival = self._inbox.add(frame)
            if arrival is None:
                return
            if arrival.payload is None:
                self._fail(frame.id, MessageTooLarge(f"the payload is longer than the limit of {self._max_message_bytes} bytes"))
            else:
                self._accept(arrival.first, arrival.payload, arrival.deadline or Deadline.from_remaining_us(0))
        elif kind == CANCEL:
            self._cancel(frame.id)
        elif kind == CREDIT:
            # Credit for what has been answered meanwhile is of no use.
            exchange = self._exchanges.get(frame.id)
            if exchange is not None:
                exchange.add_credit(frame.value)
        else:
            raise InvalidRequest(f"a {FrameKind(kind).name.lower()} frame may not be sent by the side that opened the link", field="frames")

    def _accept(self, first: Frame, payload: Payload, deadline: Deadline) -> None:
        if self._is_closing:
            self._fail(first.id, Unavailable("this service is draining"))
            return
        exchange = LinkExchange(self, first.id, first.head, payload, deadline)
        self._exchanges[first.id] = exchange
        try:
            self._on_exchange(exchange)
        except Exception as error:  # noqa: BLE001 - becomes the answer
            _LOG.exception("the handler of an exchange raised")
            exchange.fail(as_tensorway_error(error))

    def _cancel(self, id: int) -> None:
        self._inbox.drop(id, is_cancelled=True)
        exchange = self._exchanges.pop(id, None)
        if exchange is not None:
            self._outbox.withdraw(id)  # tokens that have not left
            exchange.cancel()
            self._wake()
        elif self._outbox.withdraw(id) is Progress.PARTIAL:
            # The peer holds a part of the reply, and learns here that no more of it comes.
            self._fail(id, Cancelled("the request was cancelled"))

    def _fail(self, id: int, error: TensorwayError) -> None:
        self._outbox.offer(ERROR, id, encode_detail(error))
        self._wake()

    def _break(self) -> None:
        """The link is over: nobody waits for what is open."""
        exchanges, self._exchanges = self._exchanges, {}
        for exchange in exchanges.values():
            exchange.cancel()
        self._outbox.clear()

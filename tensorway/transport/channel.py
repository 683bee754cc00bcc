"""Thin clients for single RPCs: bytes in, bytes out, errors as TensorwayError."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from tensorway.errors import NotFound, TensorwayError, Unavailable
from tensorway.tls import ChannelTls
from tensorway.transport.credentials import aio_channel, blocking_channel
from tensorway.transport.port import DEFAULT_MAX_MESSAGE_BYTES
from tensorway.transport.rich_status import decode_error

Metadata = Sequence[tuple[str, str]]

_CHECK = "/grpc.health.v1.Health/Check"


@dataclass(frozen=True, slots=True)
class UnaryReply:
    """What came back from one unary RPC. `-bin` trailers are bytes; the last value wins where a key repeats."""

    response: bytes
    trailers: Mapping[str, str | bytes]


class ReplyStream:
    """The client's side of one RPC that is answered with many messages. Cancel it when done.

    A `read` that is cancelled goes on in the background, for grpc would end the whole RPC with it; the next one takes it up.
    """

    def __init__(self, endpoint: str, call: Any) -> None:
        self.endpoint = endpoint
        self._call = call
        self._reading: asyncio.Future[Any] | None = None

    async def read(self) -> bytes | None:
        """The next message; None after the server's last, where it ended well. Raises the server's error as a TensorwayError, and
        Unavailable where the connection is lost."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._call.read())
        try:
            message = await asyncio.shield(self._reading)
        except grpc.aio.AioRpcError as error:
            raise _error_of(self.endpoint, error.code(), error.details(), error.trailing_metadata()) from error
        self._reading = None
        return None if message is grpc.aio.EOF else bytes(message)

    async def cancel(self) -> None:
        """Ends the RPC at once; harmless to repeat."""
        self._call.cancel()
        # Their outcome is of no interest any more, but somebody has to look at it.
        await asyncio.gather(*self._pending(), return_exceptions=True)

    def _pending(self) -> list[asyncio.Future[Any]]:
        return [] if self._reading is None else [self._reading]


class ClientStream(ReplyStream):
    """The client's side of one bidirectional streaming RPC. One task reads, one writes. Cancel it when done.

    A `write` that is cancelled goes on in the background like a `read`.
    """

    def __init__(self, endpoint: str, call: Any) -> None:
        super().__init__(endpoint, call)
        self._writing: asyncio.Future[Any] | None = None

    async def write(self, message: bytes) -> None:
        """Sends one message; returns when the transport can take the next. Raises Unavailable once the RPC has ended; `read` says why."""
        try:
            if self._writing is not None:
                await asyncio.shield(self._writing)
            self._writing = asyncio.ensure_future(self._call.write(message))
            await asyncio.shield(self._writing)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise Unavailable(f"the stream to {self.endpoint} has ended", hop=self.endpoint) from error
        self._writing = None

    def _pending(self) -> list[asyncio.Future[Any]]:
        return super()._pending() + ([] if self._writing is None else [self._writing])


class BlockingStream:
    """`ReplyStream` for code without a loop; one thread reads."""

    def __init__(self, endpoint: str, call: Any) -> None:
        self.endpoint = endpoint
        self._call = call

    def read(self) -> bytes | None:
        """See `ReplyStream.read`; blocks the calling thread."""
        try:
            message = next(self._call, None)
        except grpc.RpcError as error:
            ended: Any = error
            raise _error_of(self.endpoint, ended.code(), ended.details(), ended.trailing_metadata()) from error
        return None if message is None else bytes(message)

    def cancel(self) -> None:
        """Ends the RPC at once; harmless to repeat."""
        self._call.cancel()


_Make = Callable[[str, ChannelTls | None, Any], Any]


class _Connection:
    """grpc's channel, and a new one once the certificates have changed, for a channel keeps those it was made with.

    What runs on the old one goes on until the certificates change again: then it is `retired`, and its owner closes it.
    """

    def __init__(self, make: _Make, endpoint: str, options: Sequence[tuple[str, int]], tls: ChannelTls | None) -> None:
        self._make: Callable[[], Any] = lambda: make(endpoint, tls, options)
        self._tls = tls
        self._version = 0 if tls is None else tls.files.material().version
        self._channels: list[Any] = [self._make()]
        self._methods: dict[str, Any] = {}
        self.retired: list[Any] = []

    def current(self) -> Any:
        if self._tls is not None and (version := self._tls.files.material().version) != self._version:
            self._version = version
            self._methods = {}
            self._channels.append(self._make())
            self.retired += self._channels[:-2]
            del self._channels[:-2]
        return self._channels[-1]

    def unary(self, method: str) -> Any:
        """What calls `method`; made once."""
        channel = self.current()
        call = self._methods.get(method)
        if call is None:
            call = self._methods[method] = channel.unary_unary(method)
        return call

    def take_all(self) -> list[Any]:
        """Every channel, for its owner to close."""
        channels, self._channels, self.retired = [*self.retired, *self._channels], self._channels[-1:], []
        return channels


class AsyncChannel:
    """RPCs to one endpoint (`host:port` or `unix:path`). Connects on first use, and again after a lost connection. Close it when done."""

    def __init__(
        self, endpoint: str, *, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES, metadata: Metadata = (), is_one_of_many: bool = False,
        tls: ChannelTls | None = None,
    ) -> None:
        """`is_one_of_many`: another endpoint can be asked, so that a silent one is given up within two seconds. `tls` None: in the
        clear."""
        self.endpoint = endpoint
        self._metadata = tuple(metadata)
        self._connection = _Connection(aio_channel, endpoint, _arguments(max_message_bytes, is_one_of_many), tls)

    async def unary(self, method: str, request: bytes, timeout_s: float | None, metadata: Metadata = ()) -> UnaryReply:
        """Calls `method` (full name) with a serialised request; `timeout_s` None sets no deadline. Raises the server's error as a
        TensorwayError, and Unavailable or DeadlineExceeded where it did not answer."""
        if self._connection.retired:
            await self._connection.retired.pop().close()
        try:
            pending = self._connection.unary(method)(request, timeout=timeout_s, metadata=(*self._metadata, *metadata))
            response = await pending
            return UnaryReply(response, dict(await pending.trailing_metadata()))
        except grpc.aio.AioRpcError as error:
            raise _error_of(self.endpoint, error.code(), error.details(), error.trailing_metadata()) from error

    def server_stream(self, method: str, request: bytes, timeout_s: float | None, metadata: Metadata = ()) -> ReplyStream:
        """Begins an RPC with one request and many replies; `timeout_s` None sets no deadline. Never raises: the first `read` says what is
        wrong."""
        call = self._connection.current().unary_stream(method)(request, timeout=timeout_s, metadata=(*self._metadata, *metadata))
        return ReplyStream(self.endpoint, call)

    def stream(self, method: str, metadata: Metadata = ()) -> ClientStream:
        """Begins a bidirectional streaming RPC without a deadline. Never raises: the first `read` or `write` says what is wrong."""
        return ClientStream(self.endpoint, self._connection.current().stream_stream(method)(metadata=(*self._metadata, *metadata)))

    async def close(self) -> None:
        """Cancels what is in flight and closes the connection."""
        for channel in self._connection.take_all():
            await channel.close()


class BlockingChannel:
    """`AsyncChannel` for code without a loop; safe to share between threads."""

    def __init__(
        self, endpoint: str, *, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES, metadata: Metadata = (), is_one_of_many: bool = False,
        tls: ChannelTls | None = None,
    ) -> None:
        """See `AsyncChannel`."""
        self.endpoint = endpoint
        self._metadata = tuple(metadata)
        self._connection = _Connection(blocking_channel, endpoint, _arguments(max_message_bytes, is_one_of_many), tls)

    def unary(self, method: str, request: bytes, timeout_s: float | None, metadata: Metadata = ()) -> UnaryReply:
        """See `AsyncChannel.unary`; blocks the calling thread."""
        if self._connection.retired:
            self._connection.retired.pop().close()
        try:
            response, ended = self._connection.unary(method).with_call(request, timeout=timeout_s, metadata=(*self._metadata, *metadata))
        except grpc.RpcError as error:
            ended = error
            raise _error_of(self.endpoint, ended.code(), ended.details(), ended.trailing_metadata()) from error
        return UnaryReply(response, dict(ended.trailing_metadata() or ()))

    def server_stream(self, method: str, request: bytes, timeout_s: float | None, metadata: Metadata = ()) -> BlockingStream:
        """See `AsyncChannel.server_stream`."""
        call = self._connection.current().unary_stream(method)(request, timeout=timeout_s, metadata=(*self._metadata, *metadata))
        return BlockingStream(self.endpoint, call)

    def close(self) -> None:
        """Cancels what is in flight and closes the connection."""
        for channel in self._connection.take_all():
            channel.close()


async def check_health(endpoint: str, service: str, timeout_s: float, tls: ChannelTls | None = None) -> str:
    """What grpc.health.v1 says of `service` ("" is the whole server): SERVING, NOT_SERVING, UNKNOWN, or SERVICE_UNKNOWN where the server
    does not know the name. Raises Unavailable or DeadlineExceeded where nobody answers."""
    channel = AsyncChannel(endpoint, tls=tls)
    try:
        reply = await channel.unary(_CHECK, HealthCheckRequest(service=service).SerializeToString(), timeout_s)
    except NotFound:
        return "SERVICE_UNKNOWN"
    finally:
        await channel.close()
    status: str = HealthCheckResponse.ServingStatus.Name(HealthCheckResponse.FromString(reply.response).status)
    return status


def _arguments(max_message_bytes: int, is_one_of_many: bool) -> list[tuple[str, int]]:
    arguments = [("grpc.max_receive_message_length", max_message_bytes), ("grpc.max_send_message_length", max_message_bytes)]
    if not is_one_of_many:
        return [*arguments, ("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 5_000)]
    return [
        *arguments,
        ("grpc.keepalive_time_ms", 1_000),
        ("grpc.keepalive_timeout_ms", 1_000),
        ("grpc.http2.ping_timeout_ms", 1_000),
        ("grpc.http2.max_pings_without_data", 0),
        # Also how long an attempt to connect may take: core would wait 20 s for a host that drops packets.
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 500),
    ]


def _error_of(endpoint: str, code: grpc.StatusCode, sentence: str | None, trailers: Iterable[Any] | None) -> TensorwayError:
    return decode_error(code.value[0], sentence or f"{endpoint} answered {code.name}", dict(trailers or ()))

"""What both server implementations share: routes, channel arguments, and the sentences a client gets to read."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol, cast

from tensorway.errors import (
    Cancelled,
    FailedPrecondition,
    InvalidRequest,
    MessageTooLarge,
    Overloaded,
    TensorwayError,
    Unavailable,
    Unimplemented,
)
from tensorway.tls import ServerTls
from tensorway.transport.port import Call, ServerOptions, Stream, StreamHandler, UnaryHandler

#: A full server says to come back after this.
RETRY_AFTER_S: Final = 0.1
#: Handlers cancelled at stop get this long to unwind before they are named in the log and left behind.
UNWIND_S: Final = 5.0

#: A client that says nothing before it hears something is refused after so long.
_HEAR_OUT_S: Final = 0.5
#: Refused streams of one server that wait for it at once.
MAX_HEARD_OUT: Final = 100
_UNIX: Final = "unix:"
_LAST_PORT: Final = 65535


class _ToldStream(Protocol):
    """What both servers' streams tell besides the port."""

    #: Whether the handler has asked for a message.
    has_read: bool


@dataclass(slots=True)
class Routes:
    """Handlers by full method name. A method has one handler. Where `tls` says who may call what, they see no other caller.

    A client whose stream is refused before it was heard may say its first message: grpc.aio's client takes a write that fails, because the
    status came first, for the end of the RPC, and reads INTERNAL instead of why it was refused.
    """

    tls: ServerTls | None = None
    unary: dict[str, UnaryHandler] = field(default_factory=dict)
    streams: dict[str, StreamHandler] = field(default_factory=dict)
    #: Refused streams that are heard out at this moment.
    num_heard_out: int = 0

    def add_unary(self, method: str, handler: UnaryHandler) -> None:
        self._check_new(method)
        self.unary[method] = handler if self.tls is None or self.tls.callers is None else _guard_unary(self.tls, handler)

    def add_stream(self, method: str, handler: StreamHandler) -> None:
        self._check_new(method)
        guarded = handler if self.tls is None or self.tls.callers is None else _guard_stream(self.tls, handler)

        async def heard(stream: Stream) -> None:
            try:
                await guarded(stream)
            except TensorwayError:
                if not cast("_ToldStream", stream).has_read:
                    await self.hear_out(stream.read)
                raise

        self.streams[method] = heard

    async def hear_out(self, read: Callable[[], Awaitable[bytes | None]]) -> None:
        """Awaits the first message for a moment; not where many do so already, for whoever is refused must not keep others out."""
        if self.num_heard_out >= MAX_HEARD_OUT:
            return
        self.num_heard_out += 1
        try:
            with suppress(TimeoutError, TensorwayError):  # why it was refused matters more
                async with asyncio.timeout(_HEAR_OUT_S):
                    await read()
        finally:
            self.num_heard_out -= 1

    def unknown(self, method: str) -> Unimplemented:
        """What a caller of a method without a handler reads."""
        service = method.rpartition("/")[0]
        has_service = any(known.rpartition("/")[0] == service for known in (*self.unary, *self.streams))
        missing = f"method {method}" if has_service else f"service {service.removeprefix('/')}"
        return Unimplemented(f"there is no {missing} here")

    def _check_new(self, method: str) -> None:
        if not method.startswith("/") or method.count("/") != 2:
            raise FailedPrecondition(f"{method!r} is not a full method name such as /package.Service/Method", field="method")
        if method in self.unary or method in self.streams:
            raise FailedPrecondition(f"{method} already has a handler", field="method")


def _guard_unary(tls: ServerTls, handler: UnaryHandler) -> UnaryHandler:
    async def guarded(request: bytes, call: Call) -> bytes:
        tls.check(call.method, call.peer_names)
        return await handler(request, call)

    return guarded


def _guard_stream(tls: ServerTls, handler: StreamHandler) -> StreamHandler:
    async def guarded(stream: Stream) -> None:
        tls.check(stream.method, stream.peer_names)
        await handler(stream)

    return guarded


def server_arguments(options: ServerOptions) -> tuple[tuple[str, int], ...]:
    """grpc's channel arguments for a server."""
    return (
        # A second server on the same port must fail to bind instead of sharing its connections.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", options.max_message_bytes),
        # Replies are checked before they are sent, so that the client reads a sentence of ours.
        ("grpc.max_send_message_length", -1),
        # A link pings its peer every second, with or without requests; anything much faster is a flood.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
        ("grpc.http2.min_ping_interval_without_data_ms", 500),
        # A client that vanished without closing its connection is noticed by the server, too.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
    )


def too_large(num_bytes: int, options: ServerOptions) -> MessageTooLarge:
    """A reply that exceeds the limit."""
    return MessageTooLarge(f"the reply has {num_bytes} bytes, more than the limit of {options.max_message_bytes}")


def is_full(options: ServerOptions, num_in_flight: int) -> bool:
    """True where one more RPC would exceed the limit."""
    return 0 < options.max_concurrent_rpcs <= num_in_flight


def full(options: ServerOptions) -> Overloaded:
    """The refusal of one RPC too many."""
    return Overloaded(f"this server already runs {options.max_concurrent_rpcs} RPCs, the most it takes", retry_after_s=RETRY_AFTER_S)


def no_request(method: str) -> InvalidRequest:
    """The answer to a client that closed its side of a unary RPC without a message."""
    return InvalidRequest(f"{method} needs exactly one request message")


def gone() -> Cancelled:
    """What a handler gets that writes to a client that has gone."""
    return Cancelled("the client has gone")


def stopped() -> Unavailable:
    """What the client of an RPC gets that a stopping server cancelled."""
    return Unavailable("the server stopped before it could answer")


def cannot_bind(endpoint: str, why: str) -> Unavailable:
    """The error of a failed bind."""
    return Unavailable(f"cannot listen on {endpoint}: {why}")


def check_free(endpoint: str) -> None:
    """Raises Unavailable where another process listens on a unix socket (grpc would take the path away from it)."""
    if not endpoint.startswith(_UNIX):
        return
    path = endpoint.removeprefix(_UNIX)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise cannot_bind(endpoint, str(error)) from error
    if not stat.S_ISSOCK(mode):
        raise cannot_bind(endpoint, "the path exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(path) == 0:
            raise cannot_bind(endpoint, "another process listens there")


def choices(endpoint: str) -> tuple[str, ...]:
    """The endpoints to try, one after the other: `host:9100-9199` names a hundred of them. Raises InvalidRequest for no range of ports."""
    host, _, ports = endpoint.rpartition(":")
    if endpoint.startswith(_UNIX) or "-" not in ports:
        return (endpoint,)
    first, _, last = ports.partition("-")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last) <= _LAST_PORT):
        raise InvalidRequest(f"cannot listen on {endpoint}: {ports!r} is no range of ports; write it like 9100-9199", field="listen")
    return tuple(f"{host}:{port}" for port in range(int(first), int(last) + 1))


def bound_endpoint(endpoint: str, port: int) -> str:
    """`endpoint` with the port that was really bound."""
    if endpoint.startswith(_UNIX):
        return endpoint
    return f"{endpoint.rpartition(':')[0]}:{port}"

"""The transport's ports: what a service may ask of gRPC without touching grpcio.

A handler sees raw message bytes: (de)serialising belongs to the servicer, so that a payload can pass through without being parsed.
Errors are raised as `TensorwayError`; the transport turns them into a gRPC status with google.rpc details.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from tensorway.deadline import Deadline
from tensorway.errors import TensorwayError
from tensorway.tensors import Buffer
from tensorway.tls import ServerTls

DEFAULT_MAX_MESSAGE_BYTES: Final = 256 * 1024 * 1024

#: Token frames of one request that may be on their way before the reader has granted more.
TOKEN_CREDIT: Final = 8

#: Tensor bytes as the segments they arrived in; joined only where something needs them contiguous.
Payload = tuple[Buffer, ...]


class Call(Protocol):
    """The server's side of one RPC."""

    @property
    def method(self) -> str:
        """Full method name, e.g. `/tensorway.v1.InferenceService/Infer`."""

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        """Request metadata, lower-case keys; the last value wins where a key repeats. `-bin` values are bytes."""

    @property
    def deadline(self) -> Deadline | None:
        """The client's deadline; None where it set none."""

    @property
    def peer(self) -> str:
        """Where the client is, as grpc writes it."""

    @property
    def peer_names(self) -> tuple[str, ...]:
        """DNS, URI and IP names of the client's certificate, where it showed one that was verified; otherwise ()."""

    def set_trailers(self, trailers: Sequence[tuple[str, str | bytes]]) -> None:
        """Trailing metadata to send with the status, whether OK or an error."""

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once, in the loop, if the client cancels, vanishes or its deadline passes before the reply."""


class Stream(Call, Protocol):
    """The server's side of a streaming RPC (any streaming shape)."""

    async def read(self) -> bytes | None:
        """The next message; None after the client's last."""

    async def write(self, message: bytes) -> None:
        """Sends one message; returns when the transport can take the next. Raises Cancelled once the client has gone."""

    def offer(self, message: bytes) -> bool:
        """Begins to send one message if the transport takes it at once, which costs less than `write`. Where not, nothing was done and
        the answer is False: `write` it. Not while a `write` waits."""


UnaryHandler = Callable[[bytes, Call], Awaitable[bytes]]
StreamHandler = Callable[[Stream], Awaitable[None]]


class Server(Protocol):
    """A gRPC server. Handlers are added before `start`."""

    def add_unary(self, method: str, handler: UnaryHandler) -> None: ...

    def add_stream(self, method: str, handler: StreamHandler) -> None: ...

    async def start(self) -> str:
        """Binds and serves; returns the bound endpoint (with the real port where 0 was asked). Raises Unavailable naming the
        endpoint where it cannot bind."""

    async def stop(self, grace_s: float) -> None:
        """Refuses new RPCs at once, lets running ones end within `grace_s` seconds, then cancels the rest, whose clients read
        Unavailable. Long-lived streams count as running: drain links and shut health down first."""

    @property
    def num_in_flight(self) -> int:
        """RPCs that have begun and not ended."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How to listen."""

    #: `host:port` (port 0: any; `first-last`: the first that is free) or `unix:path`.
    endpoint: str
    #: `completion-queue` (fast) or `aio` (portable).
    implementation: str = "completion-queue"
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    #: Most RPCs at once before RESOURCE_EXHAUSTED; 0 for no limit.
    max_concurrent_rpcs: int = 0
    #: None: in the clear.
    tls: ServerTls | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A response frame's content."""

    head: bytes
    payload: Payload


class ReplySink(Protocol):
    """Where the outcome of a request sent over a link goes: exactly one of the two is called, once, in the loop."""

    def on_reply(self, head: bytes, payload: Payload) -> None: ...

    def on_error(self, error: TensorwayError) -> None: ...


class TokenSink(ReplySink, Protocol):
    """A sink of a request that is answered with tokens before its reply or error."""

    def on_token(self, head: bytes) -> None:
        """One token frame. Whoever is done with it grants the link one more (`LinkClient.grant`)."""


class LinkClient(Protocol):
    """The side of a link that opened it."""

    @property
    def endpoint(self) -> str: ...

    @property
    def is_connected(self) -> bool: ...

    @property
    def num_in_flight(self) -> int: ...

    async def run(self) -> None:
        """Connects, and reconnects with back-off, until cancelled; its owner keeps it in a TaskGroup. When the connection breaks,
        every request in flight gets `Unavailable` at once."""

    async def wait_connected(self, deadline: Deadline) -> None:
        """Returns once connected; raises Unavailable naming the endpoint and the last connection error at the deadline."""

    def send(self, head: bytes, payload: Payload, deadline: Deadline, sink: ReplySink) -> int:
        """Queues one request and returns its id. Raises Unavailable where the link is not connected, the peer is draining or does not
        take what is sent, and MessageTooLarge for a payload above the limit. Segments must be flat bytes that stay unchanged.
        The sender enforces the deadline: at it, `cancel` and answer for itself.

        `sink` may be a `TokenSink`; tokens for one that is not are a broken peer and end the link."""

    def grant(self, request_id: int, num_tokens: int) -> None:
        """Lets the peer send so many more token frames of a request. Unknown ids are ignored. Grants are gathered: they leave with what
        else leaves, and at the latest when half of `TOKEN_CREDIT` has come together."""

    def cancel(self, request_id: int) -> None:
        """Forgets the request (its sink is not called any more) and tells the peer. Unknown ids are ignored."""

    async def call(self, head: bytes, payload: Payload, deadline: Deadline) -> Reply:
        """`send` and wait. Raises the peer's error, Unavailable, or DeadlineExceeded; cancels at the peer when cancelled."""


class Exchange(Protocol):
    """One request as the accepting side of a link sees it. Answer exactly once with `reply` or `fail`; later ones are dropped."""

    @property
    def head(self) -> bytes: ...

    @property
    def payload(self) -> Payload: ...

    @property
    def deadline(self) -> Deadline: ...

    def reply(self, head: bytes, payload: Payload) -> None: ...

    def fail(self, error: TensorwayError) -> None: ...

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once if the peer cancels or its connection breaks before the answer."""

    @property
    def credit(self) -> int:
        """Token frames that may be pushed now."""

    def push(self, head: bytes) -> None:
        """Sends one token frame, which takes one credit; without credit, raises InternalError. Dropped once answered or cancelled."""

    def on_credit(self, callback: Callable[[], None]) -> None:
        """Has `callback` called, in the loop, each time that credit comes after there was none."""


#: Called in the loop for each request that arrives complete. Must not block, and must not raise.
ExchangeHandler = Callable[[Exchange], None]

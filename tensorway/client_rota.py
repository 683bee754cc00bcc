"""Several gateways for one client: calls go round them, and past those that do not answer.

`host:1,host:2` names the gateways. Each call takes the next in turn; one that was UNAVAILABLE is left out for a moment, unless all are. The
retries of a call therefore go to another gateway.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from tensorway.client_credentials import Credentials, no_credentials
from tensorway.client_trace import trace_headers
from tensorway.errors import InvalidRequest, Unavailable
from tensorway.transport import AsyncChannel, BlockingChannel, BlockingStream, ReplyStream, UnaryReply

Metadata = Sequence[tuple[str, str]]
ChannelT = TypeVar("ChannelT")
_GRPC_SCHEMES: Final = ("ipv4", "ipv6", "dns", "xds")
#: How long a gateway that was lost is left out, seconds; doubles up to the longest while it stays lost.
_FIRST_REST_S: Final = 0.5
_LONGEST_REST_S: Final = 2.0


def endpoints_of(endpoint: str) -> tuple[str, ...]:
    """The endpoints of a comma-separated list. Raises InvalidRequest where one is empty. A list with a scheme of gRPC's own (`ipv4:`,
    `dns:`…) is one endpoint: gRPC goes round its addresses itself."""
    if endpoint.partition(":")[0] in _GRPC_SCHEMES:
        return (endpoint,)
    endpoints = tuple(part.strip() for part in endpoint.split(","))
    if not all(endpoints):
        raise InvalidRequest(f"endpoint: {endpoint!r} names an empty endpoint; write host:port, or host:port,host:port", field="endpoint")
    return endpoints


@dataclass(slots=True)
class Rota:
    """Whose turn it is. Pure but for its lock, so that threads may share it."""

    num_members: int
    _last: int = -1
    _rests_until_s: list[float] = field(init=False)
    _num_failures: list[int] = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._rests_until_s = [0.0] * self.num_members
        self._num_failures = [0] * self.num_members

    def next(self, now_s: float) -> int:
        """The next member that does not rest; where all do, the one that has rested longest."""
        with self._lock:
            turns = [(self._last + 1 + step) % self.num_members for step in range(self.num_members)]
            awake = [member for member in turns if self._rests_until_s[member] <= now_s]
            self._last = awake[0] if awake else min(turns, key=lambda member: self._rests_until_s[member])
            return self._last

    def failed(self, member: int, now_s: float) -> None:
        """It did not answer."""
        with self._lock:
            if now_s < self._rests_until_s[member]:
                return  # of calls that were on their way together one counts
            rest_s = min(_LONGEST_REST_S, _FIRST_REST_S * 2.0 ** self._num_failures[member])
            self._num_failures[member] += 1
            self._rests_until_s[member] = now_s + rest_s

    def answered(self, member: int) -> None:
        """It did."""
        if self._num_failures[member]:
            with self._lock:
                self._num_failures[member] = 0
                self._rests_until_s[member] = 0.0


class AsyncChannels:
    """`AsyncChannel` to several gateways."""

    def __init__(self, endpoints: Sequence[str], credentials: Credentials = no_credentials, **settings: Any) -> None:
        self._credentials = credentials
        self._channels = [AsyncChannel(endpoint, is_one_of_many=len(endpoints) > 1, **settings) for endpoint in endpoints]
        self._rota = Rota(len(endpoints))

    async def unary(self, method: str, request: bytes, timeout_s: float | None) -> UnaryReply:
        """See `AsyncChannel.unary`."""
        member = self._rota.next(time.monotonic())
        try:
            reply = await self._channels[member].unary(method, request, timeout_s, self._headers())
        except Unavailable:
            self._rota.failed(member, time.monotonic())
            raise
        self._rota.answered(member)
        return reply

    def server_stream(self, method: str, request: bytes, timeout_s: float | None) -> WatchedReplyStream:
        """See `AsyncChannel.server_stream`."""
        member = self._rota.next(time.monotonic())
        return WatchedReplyStream(self._channels[member].server_stream(method, request, timeout_s, self._headers()), self._rota, member)

    async def close(self) -> None:
        """Cancels what is in flight and closes the connections."""
        for channel in self._channels:
            await channel.close()

    def _headers(self) -> Metadata:
        return (*trace_headers(), *self._credentials())


class WatchedReplyStream:
    """`ReplyStream` that tells the rota how it went."""

    def __init__(self, stream: ReplyStream, rota: Rota, member: int) -> None:
        self._stream = stream
        self._rota = rota
        self._member = member

    async def read(self) -> bytes | None:
        """See `ReplyStream.read`."""
        try:
            message = await self._stream.read()
        except Unavailable:
            self._rota.failed(self._member, time.monotonic())
            raise
        self._rota.answered(self._member)
        return message

    async def cancel(self) -> None:
        """See `ReplyStream.cancel`."""
        await self._stream.cancel()


class BlockingChannels:
    """`BlockingChannel` to several gateways."""

    def __init__(self, endpoints: Sequence[str], credentials: Credentials = no_credentials, **settings: Any) -> None:
        self._credentials = credentials
        self._channels = [BlockingChannel(endpoint, is_one_of_many=len(endpoints) > 1, **settings) for endpoint in endpoints]
        self._rota = Rota(len(endpoints))

    def unary(self, method: str, request: bytes, timeout_s: float | None) -> UnaryReply:
        """See `BlockingChannel.unary`."""
        member = self._rota.next(time.monotonic())
        try:
            reply = self._channels[member].unary(method, request, timeout_s, self._headers())
        except Unavailable:
            self._rota.failed(member, time.monotonic())
            raise
        self._rota.answered(member)
        return reply

    def server_stream(self, method: str, request: bytes, timeout_s: float | None) -> WatchedBlockingStream:
        """See `BlockingChannel.server_stream`."""
        member = self._rota.next(time.monotonic())
        return WatchedBlockingStream(self._channels[member].server_stream(method, request, timeout_s, self._headers()), self._rota, member)

    def close(self) -> None:
        """Cancels what is in flight and closes the connections."""
        for channel in self._channels:
            channel.close()

    def _headers(self) -> Metadata:
        return (*trace_headers(), *self._credentials())


class WatchedBlockingStream:
    """`BlockingStream` that tells the rota how it went."""

    def __init__(self, stream: BlockingStream, rota: Rota, member: int) -> None:
        self._stream = stream
        self._rota = rota
        self._member = member

    def read(self) -> bytes | None:
        """See `BlockingStream.read`."""
        try:
            message = self._stream.read()
        except Unavailable:
            self._rota.failed(self._member, time.monotonic())
            raise
        self._rota.answered(self._member)
        return message

    def cancel(self) -> None:
        """See `BlockingStream.cancel`."""
        self._stream.cancel()

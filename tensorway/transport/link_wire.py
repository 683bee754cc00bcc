"""What carries a link's messages on the side that opens it.

A port with two adapters: a gRPC stream (grpc.aio) and a local socket. A third, on grpc core's own completion queue, was tried and
dropped: it was no faster, because coalescing had already removed what it could have saved.
"""

from __future__ import annotations

from typing import Final, Protocol

OPEN: Final = "/tensorway.v1.LinkService/Open"

#: A silently dead peer is noticed after at most the two together. Core also pings of its own accord, to measure bandwidth, and a
#: keepalive ping waits for such a one: its limit (a minute by default) must be as short.
KEEPALIVE_TIME_MS: Final = 1_000
KEEPALIVE_TIMEOUT_MS: Final = 1_000


class WireEvents(Protocol):
    """What a wire tells its owner, in the loop."""

    def on_message(self, message: bytes | bytearray) -> None:
        """The peer's next message. May raise InvalidRequest, which ends the wire."""

    def on_written(self) -> None:
        """The last message was taken; the next may be written."""


class Wire(Protocol):
    """One bidirectional stream to a peer, for one connection's life."""

    async def run(self, events: WireEvents) -> None:
        """Opens the stream and stays until it ends, with Unavailable where the peer did not mean it, or until cancelled. Nothing of it is
        left when this returns or raises."""

    def write(self, message: bytes) -> None:
        """Starts sending one message; the next only after `on_written`."""


def wire_arguments(max_message_bytes: int) -> tuple[tuple[str, int], ...]:
    """grpc's channel arguments for a link."""
    return (
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Links join services of one mesh: a proxy for the way out to the world is not for them.
        ("grpc.enable_http_proxy", 0),
        # Each attempt to connect starts afresh: the pace of reconnecting is the link's own.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
    )

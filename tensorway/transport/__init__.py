"""The transport: the only place of Tensorway that touches grpcio.

Everything is imported on first use, so that reading `tensorway.transport.port` costs no import of grpc.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Final

from tensorway.errors import FailedPrecondition
from tensorway.tls import ChannelTls
from tensorway.transport.port import DEFAULT_MAX_MESSAGE_BYTES, LinkClient, Server, ServerOptions

# Core prints to standard error, past every logging setting, what this package raises or logs anyway. Set the variable to hear it.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

if TYPE_CHECKING:
    from tensorway.transport.channel import (
        AsyncChannel,
        BlockingChannel,
        BlockingStream,
        ClientStream,
        ReplyStream,
        UnaryReply,
        check_health,
    )
    from tensorway.transport.health import HealthService
    from tensorway.transport.link_server import LinkServer
    from tensorway.transport.reflection import add_reflection

__all__ = [
    "AsyncChannel",
    "BlockingChannel",
    "BlockingStream",
    "ClientStream",
    "HealthService",
    "LinkServer",
    "ReplyStream",
    "UnaryReply",
    "add_reflection",
    "check_health",
    "create_link_client",
    "create_server",
]

_HOME_OF: Final = {
    "AsyncChannel": "channel",
    "BlockingChannel": "channel",
    "BlockingStream": "channel",
    "ClientStream": "channel",
    "ReplyStream": "channel",
    "UnaryReply": "channel",
    "check_health": "channel",
    "HealthService": "health",
    "LinkServer": "link_server",
    "add_reflection": "reflection",
}


def __getattr__(name: str) -> object:
    """Imports the module that holds `name` the first time it is asked for."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = found
    return found


def create_server(options: ServerOptions) -> Server:
    """A gRPC server, not yet bound. Raises FailedPrecondition where `options.implementation` is not known."""
    if options.implementation == "completion-queue":
        from tensorway.transport.completion_queue_server import CompletionQueueServer

        return CompletionQueueServer(options)
    if options.implementation == "aio":
        from tensorway.transport.aio_server import AioServer

        return AioServer(options)
    raise FailedPrecondition(f"transport {options.implementation!r} is not known: use completion-queue or aio", field="implementation")


def create_link_client(
    endpoint: str,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    on_change: Callable[[], None] | None = None,
    *,
    may_be_local: bool = True,
    tls: ChannelTls | None = None,
) -> LinkClient:
    """A link to the service at `endpoint`; it connects once its `run` runs: over a local socket where that is allowed and the service is on
    this machine and listens for one, otherwise over gRPC. One payload may be `max_message_bytes` long. `on_change` is called in the loop
    whenever `is_connected` may have changed; it must not raise. `tls` None: in the clear."""
    from tensorway.transport.aio_wire import AioWire
    from tensorway.transport.link_client import StreamLinkClient
    from tensorway.transport.link_wire import Wire
    from tensorway.transport.local_socket import connect_local
    from tensorway.transport.local_wire import LocalWire

    def new_wire(endpoint: str, max_message_bytes: int) -> Wire:
        connection = connect_local(endpoint) if may_be_local else None
        return AioWire(endpoint, max_message_bytes, tls) if connection is None else LocalWire(connection, endpoint, max_message_bytes)

    return StreamLinkClient(endpoint, max_message_bytes, new_wire, on_change)

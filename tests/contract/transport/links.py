"""Both sides of a link, for tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from tensorway.deadline import Deadline
from tensorway.errors import TensorwayError
from tensorway.transport import LinkServer, create_link_client
from tensorway.transport.port import Exchange, LinkClient, Payload

from .conftest import TIMEOUT_S, Rig

LIMIT = 32 << 20


class Peer:
    """An accepting side whose exchanges the test answers, or which echoes."""

    def __init__(self, rig: Rig, echoes: bool, max_message_bytes: int = LIMIT) -> None:
        self.rig = rig
        self.exchanges: asyncio.Queue[Exchange] = asyncio.Queue()
        self.links = LinkServer(echo if echoes else self.exchanges.put_nowait, max_message_bytes)

    async def start(self, endpoint: str = "127.0.0.1:0") -> str:
        bound = await self.rig.serve(endpoint=endpoint, max_message_bytes=LIMIT, prepare=self.links.attach)
        if self.rig.is_local:
            assert await self.links.listen_local(bound)
            self.rig.at_end(self.links.close)
        return bound

    async def stop(self) -> None:
        """Ends every link at once."""
        await self.rig.servers[0].stop(0.0)
        await self.links.close()


def echo(exchange: Exchange) -> None:
    exchange.reply(exchange.head, exchange.payload)


@contextlib.asynccontextmanager
async def linked(endpoint: str, max_message_bytes: int = LIMIT, on_change: Callable[[], None] | None = None) -> AsyncIterator[LinkClient]:
    client = create_link_client(endpoint, max_message_bytes, on_change)
    running = asyncio.ensure_future(client.run())
    try:
        await client.wait_connected(Deadline.after(TIMEOUT_S))
        yield client
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


def in_time() -> Deadline:
    return Deadline.after(TIMEOUT_S)


def joined(payload: Payload) -> bytes:
    return b"".join(payload)


class Sink:
    """Remembers the outcome of one request."""

    def __init__(self) -> None:
        self.outcome: asyncio.Future[tuple[bytes, Payload]] = asyncio.get_running_loop().create_future()

    def on_reply(self, head: bytes, payload: Payload) -> None:
        self.outcome.set_result((head, payload))

    def on_error(self, error: TensorwayError) -> None:
        self.outcome.set_exception(error)

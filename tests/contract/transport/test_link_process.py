"""Links to a process of its own, which is killed, or stops moving."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tensorway.deadline import Deadline
from tensorway.errors import Unavailable
from tensorway.transport import create_link_client
from tensorway.transport.port import LinkClient

from .conftest import IMPLEMENTATIONS, LOCAL, TIMEOUT_S, soon

_SERVER = """
import asyncio, sys
from tensorway.transport import LinkServer, create_server
from tensorway.transport.port import ServerOptions

async def main():
    is_local = sys.argv[2] == "local"
    server = create_server(ServerOptions(sys.argv[1], "completion-queue" if is_local else sys.argv[2]))
    links = LinkServer(lambda exchange: exchange.reply(b"pong", ()) if exchange.head == b"ping" else None)
    links.attach(server)
    bound = await server.start()
    if is_local and not await links.listen_local(bound):
        raise SystemExit("no local socket")
    print(bound, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture(params=[*IMPLEMENTATIONS, LOCAL])
def implementation(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@contextlib.asynccontextmanager
async def process(endpoint: str, implementation: str) -> AsyncIterator[asyncio.subprocess.Process]:
    started = await asyncio.create_subprocess_exec(sys.executable, "-c", _SERVER, endpoint, implementation, stdout=asyncio.subprocess.PIPE)
    try:
        assert started.stdout is not None
        assert (await soon(started.stdout.readline())) == f"{endpoint}\n".encode()
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            started.kill()
        await started.wait()
        # Lets the transport of the pipe close before the loop does.
        started._transport.close()  # type: ignore[attr-defined]


@pytest.fixture
def endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextlib.asynccontextmanager
async def linked(endpoint: str) -> AsyncIterator[LinkClient]:
    client = create_link_client(endpoint)
    running = asyncio.ensure_future(client.run())
    try:
        yield client
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def _fails(link: LinkClient, signal_number: signal.Signals, peer: asyncio.subprocess.Process) -> None:
    calls = [asyncio.ensure_future(link.call(b"never answered", (b"x",), Deadline.after(TIMEOUT_S))) for _ in range(20)]
    assert (await link.call(b"ping", (), Deadline.after(TIMEOUT_S))).head == b"pong"
    peer.send_signal(signal_number)
    for call in calls:
        with pytest.raises(Unavailable, match="broke"):
            await call
    assert link.num_in_flight == 0


async def test_a_killed_peer_fails_what_is_in_flight_and_is_found_again(endpoint: str, implementation: str) -> None:
    async with linked(endpoint) as link:
        for _ in range(2):
            async with process(endpoint, implementation) as peer:
                await link.wait_connected(Deadline.after(TIMEOUT_S))
                await _fails(link, signal.SIGKILL, peer)


async def test_a_link_that_may_not_be_local_is_not(endpoint: str) -> None:
    """Both ways lead to the same service; which one was taken shows in the process's sockets."""
    async with process(endpoint, LOCAL) as peer:
        for may_be_local in (True, False):
            client = create_link_client(endpoint, may_be_local=may_be_local)
            running = asyncio.ensure_future(client.run())
            await client.wait_connected(Deadline.after(TIMEOUT_S))
            assert (await client.call(b"ping", (), Deadline.after(TIMEOUT_S))).head == b"pong"
            listed = await asyncio.to_thread(Path(f"/proc/{peer.pid}/net/unix").read_text)
            # One line is the listening socket, another one each accepted connection.
            assert listed.count(f"@tensorway/link/{endpoint}") == (2 if may_be_local else 1)
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running


async def test_a_peer_that_falls_silent_is_noticed(endpoint: str, implementation: str) -> None:
    async with process(endpoint, implementation) as peer, linked(endpoint) as link:
        await link.wait_connected(Deadline.after(TIMEOUT_S))
        # Well before the requests' own deadline, by the link's keepalive.
        await _fails(link, signal.SIGSTOP, peer)

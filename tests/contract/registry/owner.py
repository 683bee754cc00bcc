"""A process that owns something in a registry, as services do: a real gRPC server with health, a registration, a claim.

`python -m tests.contract.registry.owner URL` registers group `g/1` and claims `m/r/0`; it prints `held ENDPOINT`, and `lost` should it lose
the claim. SIGTERM ends it in order.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tensorway.registry import open_registry
from tensorway.registry.port import GROUP, Registration
from tensorway.transport import HealthService, create_server
from tensorway.transport.port import ServerOptions

ID = "g/1"
CLAIM = "m/r/0"
METADATA = {"model": "m"}


@dataclass
class Owner:
    """A running owner."""

    process: Process
    registration: Registration

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def cont(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        async with asyncio.timeout(40):
            return (await self.process.stdout.readline()).decode().strip()


@asynccontextmanager
async def running_owner(url: str) -> AsyncIterator[Owner]:
    """An owner that holds its registration and claim; killed at the end."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", __name__, url, stdout=PIPE)
    owner = Owner(process, Registration(GROUP, ID, ""))
    try:
        word, _, endpoint = (await owner.line()).partition(" ")
        assert word == "held"
        owner.registration = Registration(GROUP, ID, endpoint, METADATA)
        yield owner
    finally:
        if process.returncode is None:
            await owner.kill()


async def _main(url: str) -> None:
    registry = open_registry(url)
    server = create_server(ServerOptions("127.0.0.1:0"))
    health = HealthService()
    health.attach(server)
    endpoint = await server.start()
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await registry.register(Registration(GROUP, ID, endpoint, METADATA))
    claim = await registry.claim(CLAIM, "owner")
    assert claim is not None
    print("held", endpoint, flush=True)
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(_say_lost(claim.wait_lost()))
        await stopping.wait()
        watching.cancel()
    await registry.close()
    await server.stop(0.0)


async def _say_lost(lost: object) -> None:
    await lost  # type: ignore[misc]
    print("lost", flush=True)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))

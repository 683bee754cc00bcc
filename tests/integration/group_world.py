"""A mesh whose groups are hurt, a client of it, and what it holds of the machine."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tensorway import AsyncClient
from tensorway.errors import DeadlineExceeded, Overloaded, TensorwayError, Unavailable
from tensorway.transport.channel import AsyncChannel
from tests.integration.conftest import Mesh, running_mesh
from tests.integration.hurt_groups import (
    RECOVERY_S,
    History,
    ask,
    children,
    history_of,
    is_right,
    listening_of,
)
from tests.integration.test_faults import usage

HUNG_AFTER_S = 2.0
MAX_STEP_S = 4.0
#: How much later than its deadline a request may end.
LATE_S = 0.5
LIST_GROUPS = "/tensorway.v1.NodeService/ListGroups"


@dataclass
class World:
    """A mesh with a group of every shape, a client of it, and what its node says."""

    mesh: Mesh
    client: AsyncClient
    history: History
    #: Where its processes put temporary files.
    temporary: Path = Path()

    async def call(self, model: str, *orders: tuple[int, int, int], timeout_s: float = RECOVERY_S) -> TensorwayError | None:
        """One request. Its answer must be right; what it fails with is returned; either comes in time."""
        inputs = ask(*orders)
        began_s = time.monotonic()
        try:
            output = (await self.client.infer(model, inputs, timeout_s=timeout_s))["y"]
        except TensorwayError as error:
            return error
        finally:
            took_s = time.monotonic() - began_s
            assert took_s < timeout_s + LATE_S, f"ended {took_s:.1f} s after its start, with a timeout of {timeout_s} s"
        assert is_right(inputs, output)
        return None

    async def call_all(self, model: str, ranks: tuple[int, ...], what: int) -> TensorwayError | None:
        """One request of one row with the same order for several ranks; what it fails with."""
        inputs = ask((0, what, 0))
        inputs["order"][0, 0] = sum(1 << rank for rank in ranks)
        try:
            await self.client.infer(model, inputs)
        except TensorwayError as error:
            return error
        return None

    async def answered(self, model: str) -> None:
        """Returns once a request is answered."""
        async with asyncio.timeout(RECOVERY_S):
            while isinstance(await self.call(model), Unavailable | DeadlineExceeded | Overloaded):
                await asyncio.sleep(0.02)


@asynccontextmanager
async def channel_to(endpoint: str) -> AsyncIterator[AsyncChannel]:
    channel = AsyncChannel(endpoint)
    try:
        yield channel
    finally:
        await channel.close()


@asynccontextmanager
async def world_of(
    folder: Path, models: Path, *names: str, hung_after_s: float = HUNG_AFTER_S, max_step_s: float = MAX_STEP_S
) -> AsyncIterator[World]:
    """A mesh of one node that serves these models, and whose temporary files lie in a folder of their own."""
    temporary = folder / "temporary"
    temporary.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        async with (
            running_mesh(
                folder, *names, models_dir=models, hung_after_s=hung_after_s, heartbeat_s=0.25, max_step_s=max_step_s
            ) as mesh,
            AsyncClient(mesh.endpoint, retries=0) as client,
            history_of(mesh) as history,
        ):
            yield World(mesh, client, history, temporary)


@dataclass(frozen=True)
class Footprint:
    """What the mesh holds of the machine."""

    zombies: int
    num_processes: int
    num_listening: int
    shared_memory: tuple[str, ...]
    temporary: tuple[str, ...]
    #: Open descriptors and threads of each service.
    services: dict[str, tuple[int, int]]


async def settled(world: World) -> Footprint:
    """The footprint once it has not changed for a second."""
    last, since_s = footprint(world), time.monotonic()
    async with asyncio.timeout(30):
        while time.monotonic() - since_s < 1.0:
            await asyncio.sleep(0.1)
            now = footprint(world)
            if now != last:
                last, since_s = now, time.monotonic()
    return last


def footprint(world: World) -> Footprint:
    members = world.mesh.processes.members
    found = {pid: state for member in members.values() for pid, state in children(member.process.pid).items()}
    return Footprint(
        zombies=sum(state == "Z" for state in found.values()),
        num_processes=len(found),
        num_listening=len(listening_of([*found, *(member.process.pid for member in members.values())])),
        shared_memory=tuple(sorted(os.listdir("/dev/shm"))),
        temporary=tuple(sorted(str(path.relative_to(world.temporary)) for path in world.temporary.rglob("*"))),
        services={name: usage(member.process.pid) for name, member in members.items()},
    )



"""Groups of several ranks hurt with real signals, real failures and real lack of memory, while requests are on their way."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from tensorway import AsyncClient
from tensorway.errors import DeadlineExceeded, ModelFailed, OutOfMemory, Overloaded, TensorwayError, Unavailable
from tensorway.registry.port import GROUP
from tests.integration.conftest import Mesh, running_mesh
from tests.integration.hurt_groups import (
    FILL, RAISE, RECOVERY_S, SLEEP, History, Report, ask, history_of, is_right, pids_of, real, send_for_epoch, staged,
)
from tests.integration.test_faults import wait_gone

pytestmark = [pytest.mark.models, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

HUNG_AFTER_S = 2.0
MAX_STEP_S = 5.0
#: How much later than its deadline a request may end.
LATE_S = 0.5
SHAPES = ((2, 1), (1, 2), (2, 2))


@dataclass
class World:
    """A mesh with a group of every shape, a client of it, and what its node says."""

    mesh: Mesh
    client: AsyncClient
    history: History

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

    async def answered(self, model: str) -> None:
        """Returns once a request is answered."""
        async with asyncio.timeout(RECOVERY_S):
            while isinstance(await self.call(model), Unavailable | DeadlineExceeded | Overloaded):
                await asyncio.sleep(0.02)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("groups")
    models = folder / "models"
    names = [staged(models, *shape) for shape in SHAPES]
    async with (
        running_mesh(
            folder, *names, models_dir=models, hung_after_s=HUNG_AFTER_S, heartbeat_s=0.25, max_step_s=MAX_STEP_S
        ) as mesh,
        AsyncClient(mesh.endpoint, retries=0) as client,
        history_of(mesh) as history,
    ):
        yield World(mesh, client, history)


async def hurt(world: World, shape: tuple[int, int], rank: int, number: int) -> tuple[Report, Report, list[TensorwayError | None]]:
    """Sends a signal to a rank in the middle of a step; the reports before and after, and how the requests ended."""
    model = f"staged-{shape[0]}x{shape[1]}"
    before = await world.history.ready(model)
    async with asyncio.TaskGroup() as tasks:
        slow = [tasks.create_task(world.call(model, (rank, SLEEP, 400))) for _ in range(2)]
        short = [tasks.create_task(world.call(model, timeout_s=0.8)) for _ in range(3)]
        await asyncio.sleep(0.2)
        os.kill(before["ranks"][rank]["pid"], number)
        await asyncio.sleep(0.05)
        late = [tasks.create_task(world.call(model, timeout_s=timeout_s)) for timeout_s in (0.5, RECOVERY_S)]
    after = await world.history.ready(model, before["epoch"] + 1)
    assert after["epoch"] == before["epoch"] + 1
    await wait_gone(*pids_of(before))
    await world.answered(model)
    return before, after, [task.result() for task in (*slow, *short, *late)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
async def test_each_rank_killed_in_the_middle_of_a_step(world: World, shape: tuple[int, int]) -> None:
    for rank in range(shape[0] * shape[1]):
        before, after, ended = await hurt(world, shape, rank, signal.SIGKILL)
        assert {type(error) for error in ended if error is not None} <= {Unavailable, DeadlineExceeded}, ended
        why = await world.history.why(before["model"], before["epoch"])
        assert why.startswith(f"rank {rank} on node-1 was killed by SIGKILL"), why
        registered = [row for row in await world.mesh.members(GROUP) if row.metadata["model"] == before["model"]]
        assert [int(row.metadata["epoch"]) for row in registered] == [after["epoch"]]
        refused = await send_for_epoch(after, before["epoch"])
        assert isinstance(refused, Unavailable)
        assert f"is in epoch {after['epoch']}" in refused.message
        assert await send_for_epoch(after, after["epoch"]) is None

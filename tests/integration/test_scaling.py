"""Replicas that come with the load and go without it, in a whole mesh of real processes; every request is answered."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tensorway import AsyncClient
from tensorway.cli.models import models_app
from tensorway.errors import FailedPrecondition, TensorwayError
from tensorway.load_report import LoadReport
from tensorway.registry.port import DESIRED, GROUP, Registry
from tests.integration.conftest import TEST_MODELS, Mesh, running_mesh

PACED = "paced"


@dataclass(eq=False)
class Callers:
    """Callers that send numbers one after another and check every answer. None is ever tried again: whoever is lost is seen."""

    client: AsyncClient
    #: Between an answer and the next request, seconds.
    pause_s: float = 0.0
    num_answered: int = 0
    lost: list[TensorwayError] = field(default_factory=list)
    is_over: bool = False

    async def call(self, first: int) -> None:
        number = first
        while not self.is_over:
            try:
                await ask(self.client, number)
                self.num_answered += 1
            except TensorwayError as error:
                self.lost.append(error)
            number += 1
            await asyncio.sleep(self.pause_s)


async def ask(client: AsyncClient, number: int) -> None:
    """One request, whose answer must be right."""
    answer = await client.infer(PACED, {"number": np.array([number], np.int64)}, timeout_s=60)
    assert answer["doubled"].tolist() == [2 * number]


@asynccontextmanager
async def callers(endpoint: str, num: int, pause_s: float = 0.0) -> AsyncIterator[Callers]:
    """Call while the block runs; afterwards all must have been answered."""
    async with AsyncClient(endpoint, retries=0) as client:
        traffic = Callers(client, pause_s)
        async with asyncio.TaskGroup() as tasks:
            for number in range(num):
                tasks.create_task(traffic.call(1000 * number))
            try:
                yield traffic
            finally:
                traffic.is_over = True
    assert traffic.lost == [] and traffic.num_answered


async def wanted(registry: Registry, number: int) -> None:
    """Returns once so many replicas are wanted."""
    async with asyncio.timeout(60):
        async for documents in registry.watch_documents(DESIRED):
            if json.loads(documents[f"{DESIRED}{PACED}"])["replicas"] == number:
                return


async def decides(registry: Registry, other_than: str = "") -> str:
    """The orchestrator that decides on the model, once there is one besides `other_than`."""
    async with asyncio.timeout(60):
        async for claims in registry.watch_claims("scaler/"):
            holder = claims.get(f"scaler/{PACED}", "").removeprefix("orchestrator:")
            if holder not in ("", other_than):
                return holder
    raise AssertionError("a watch never ends")


async def report(client: AsyncClient) -> LoadReport:
    (found,) = await client.load(PACED)
    return found


async def grows_and_shrinks(mesh: Mesh) -> None:
    """Load of more than one replica's target brings another; little load lets it go, and none the last."""
    async with AsyncClient(mesh.endpoint) as client:
        async with callers(mesh.endpoint, 12):
            await mesh.wait_members(GROUP, 2)
            loaded = await report(client)
        assert loaded.num_wanted_replicas == 2 and loaded.predicted_replicas > 1.0
        assert loaded.arrival_rows_per_s > 5.0 and loaded.utilisation > 0.02 and loaded.queue_s > 0.0
        assert (loaded.min_replicas, loaded.max_replicas) == (0, 2) and loaded.orchestrators
        async with callers(mesh.endpoint, 1, pause_s=0.1):
            await mesh.wait_members(GROUP, 1)
        await mesh.wait_members(GROUP, 0)
        assert (await report(client)).num_wanted_replicas == 0


async def starts_with_a_request(mesh: Mesh) -> None:
    """A model without a replica says why, is ready, and answers."""
    async with AsyncClient(mesh.endpoint, retries=0) as client:
        asleep = await client.model(PACED)
        assert (asleep.state, asleep.reason) == ("unavailable", "scaled to zero; starts with the first request")
        assert await client.is_ready()
        await asyncio.gather(*(ask(client, number) for number in range(9)))
        assert (await client.model(PACED)).num_replicas == 1


async def obeys_a_hand(mesh: Mesh) -> None:
    """Within bounds; while the number falls, nobody is lost."""
    async with AsyncClient(mesh.endpoint) as client:
        with pytest.raises(FailedPrecondition, match="scales between 0 and 2, and 3 is outside"):
            await client.scale(PACED, 3)
        async with callers(mesh.endpoint, 2, pause_s=0.2):
            assert (await client.scale(PACED, 2)).num_replicas == 2
            await mesh.wait_members(GROUP, 2)
            await client.scale(PACED, 1)
            await mesh.wait_members(GROUP, 1)


async def survives_who_decides(mesh: Mesh) -> None:
    """The orchestrator that decides is killed: the other one goes on."""
    first = await decides(mesh.registry)
    process = mesh.processes.members[first].process
    process.send_signal(signal.SIGKILL)
    await process.wait()
    del mesh.processes.members[first]
    assert await decides(mesh.registry, first) != first
    await wanted(mesh.registry, 0)
    await mesh.wait_members(GROUP, 0)


def tell(mesh: Mesh, *arguments: str) -> str:
    """What `tensorway models` prints."""
    result = CliRunner().invoke(models_app, [*arguments, "--endpoint", mesh.endpoint], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.output


async def test_replicas_follow_the_load(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, PACED, models_dir=TEST_MODELS, orchestrators=2, spread_wait_s=0.5) as mesh:
        await grows_and_shrinks(mesh)
        await starts_with_a_request(mesh)
        await obeys_a_hand(mesh)
        await survives_who_decides(mesh)
        assert "0 to 2" in await asyncio.to_thread(tell, mesh, "load")
        assert "paced: 1 replica wanted, 0 serving now" in await asyncio.to_thread(tell, mesh, "scale", PACED, "1")
        await wanted(mesh.registry, 1)

"""Groups that cannot start, and groups that take over from each other."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tensorway import AsyncClient
from tensorway.errors import Unavailable
from tensorway.registry.port import GROUP, NODE
from tensorway.v1 import node_pb2
from tests.integration.conftest import running_mesh
from tests.integration.group_world import HUNG_AFTER_S, LIST_GROUPS, World, channel_to
from tests.integration.hurt_groups import (
    RECOVERY_S,
    History,
    Report,
    ask,
    has_ended,
    history_of,
    pids_of,
    staged,
)
from tests.integration.test_faults import wait_gone
from tests.integration.test_mesh import run
from tests.integration.test_up import TENSORWAY

pytestmark = [pytest.mark.slow]


async def test_groups_that_cannot_start_back_off_and_say_why_in_every_place(tmp_path: Path) -> None:
    models = tmp_path / "models"
    staged(models, 2, 1, "broken")
    code = models / "broken" / "model.py"
    code.write_text(code.read_text() + "\nraise RuntimeError('written in haste')\n")
    staged(models, 2, 1, "dies", settings={"dies": 1})
    staged(models, 2, 1, "sleeps", settings={"sleeps": 1}, startup_timeout_s=16)
    staged(models, 1, 1, "good")
    words = {
        "broken": r"rank \d on node-1: load raised RuntimeError: written in haste \(model.py:\d+ in <module>\)",
        "dies": r"rank 1 on node-1 was killed by SIGABRT; its last lines: .*about to die",
        "sleeps": r"rank 1 on node-1.*state loading.*about to sleep",
    }
    # As a table folds it: letters only.
    said = {"broken": "writteninhaste", "dies": "abouttodie", "sleeps": "abouttosleep"}
    offered = '["good","' + '","'.join(words) + '"]'
    async with (
        running_mesh(tmp_path, "good", models_dir=models, models=offered) as mesh,
        AsyncClient(mesh.endpoint) as client, history_of(mesh) as history,
    ):
        for model, pattern in words.items():
            assert re.search(pattern, await history.why(model, 1)), model
        await history.until(lambda one: one["model"] == "dies" and one["state"] == "backing_off" and one["epoch"] > 2)
        backing_off = [one for one in history.said if one["model"] == "dies" and one["state"] == "backing_off"]
        waits = {one["epoch"]: float(one["detail"].split()[3]) for one in backing_off}
        assert all(wait_s == pytest.approx(0.2 * 2 ** (epoch - 1)) for epoch, wait_s in waits.items()), waits
        async with asyncio.timeout(RECOVERY_S):
            for model, pattern in words.items():
                while not re.search(pattern, (await client.model(model)).reason):
                    await asyncio.sleep(0.05)
        (node,) = await mesh.members(NODE)
        async with channel_to(node.endpoint) as channel:
            reply = await channel.unary(LIST_GROUPS, b"", 10.0)
        reasons = {group.model: group.reason for group in node_pb2.ListGroupsResponse.FromString(reply.response).groups}
        log = mesh.processes.members["node-1"].log.read_text()
        listed = await run(TENSORWAY, "models", "--endpoint", mesh.endpoint)
        for model, pattern in words.items():
            assert model in listed
            shown = await run(TENSORWAY, "models", "show", model, "--endpoint", mesh.endpoint)
            assert said[model] in re.sub(r"\W", "", shown), shown
            assert re.search(pattern, reasons[model]), model
            assert re.search(pattern, log), model
        with pytest.raises(Unavailable, match="`tensorway models` says why"):
            await client.infer("dies", ask(), timeout_s=5.0)


@dataclass(eq=False)
class Load:
    """Callers that send one request after another."""

    num_answered: int = 0
    is_over: bool = False

    async def call(self, world: World, model: str) -> None:
        while not self.is_over:
            error = await world.call(model, timeout_s=20.0)
            assert error is None, error
            self.num_answered += 1


@asynccontextmanager
async def load_of(world: World, model: str) -> AsyncIterator[Load]:
    """Requests without end while the block runs; one that fails fails the block."""
    async with asyncio.TaskGroup() as tasks:
        load = Load()
        for _ in range(4):
            tasks.create_task(load.call(world, model))
        yield load
        load.is_over = True


def is_ready_at(report: Report, node: str, epoch: int) -> bool:
    return report["id"].endswith(f"@{node}") and report["state"] == "ready" and report["epoch"] >= epoch


async def group_of(history: History, node: str) -> Report:
    """The newest report of the group that serves on a node."""
    await history.until(lambda one: is_ready_at(one, node, 1))
    return next(one for one in reversed(history.said) if is_ready_at(one, node, 1))


async def test_with_a_second_replica_nothing_fails_whatever_dies(tmp_path: Path) -> None:
    """A rank killed, a rank stopped, a node told to stop, a node killed: no request fails, and another node takes over."""
    models = tmp_path / "models"
    model = staged(models, 2, 1, replicas=2)
    settings = {"hung_after_s": HUNG_AFTER_S, "heartbeat_s": 0.25, "spread_wait_s": 8.0}
    async with (
        running_mesh(tmp_path, model, models_dir=models, nodes=2, **settings) as mesh,
        AsyncClient(mesh.endpoint, retries=0) as client, history_of(mesh) as history,
    ):
        world = World(mesh, client, history)
        groups = {row.metadata["node"]: row for row in await mesh.wait_members(GROUP, 2)}
        assert groups.keys() == {"node-1", "node-2"}
        async with load_of(world, model) as load:
            for node, rank, number in (("node-1", 1, signal.SIGKILL), ("node-2", 0, signal.SIGSTOP)):
                before = await group_of(history, node)
                os.kill(before["ranks"][rank]["pid"], number)
                await history.until(lambda one, node=node, after=before["epoch"]: is_ready_at(one, node, after + 1))
                await mesh.wait_members(GROUP, 2)
            assert load.num_answered > 100

            await mesh.start("node-3", "node")
            await mesh.wait_members(NODE, 3)
            first = mesh.processes.members["node-1"]
            ranks = pids_of(await group_of(history, "node-1"))
            await mesh.processes.stop_member(first)
            assert first.process.returncode == 0, first.last_lines()
            await wait_gone(*ranks)
            await history.until(lambda one: is_ready_at(one, "node-3", 1))
            await mesh.wait_members(GROUP, 2)

            second = mesh.processes.members["node-2"]
            ranks = pids_of(await group_of(history, "node-2"))
            second.process.kill()
            await second.process.wait()
            async with asyncio.timeout(1.0):
                while not all(map(has_ended, ranks)):
                    await asyncio.sleep(0.01)
            await mesh.wait_members(GROUP, 2)
            await asyncio.sleep(0.5)

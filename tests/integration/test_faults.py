"""Real processes hurt with real signals while requests are in flight."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tensorway import AsyncClient
from tensorway.errors import TensorwayError, Unavailable
from tensorway.registry.port import GROUP, NODE, NODES, ORCHESTRATOR
from tests.integration.conftest import MODELS, Mesh, running_mesh

#: Longer than any group needs to be formed anew on a busy machine.
RECOVERY_S = 60.0


@dataclass(eq=False)
class Traffic:
    """Callers that each send one identity request after another and check every answer."""

    client: AsyncClient
    answered: int = 0
    errors: list[TensorwayError] = field(default_factory=list)
    is_over: bool = False

    async def call(self, number: int) -> None:
        sent = np.full((1 + number % 3, 64), float(number), np.float32)
        while not self.is_over:
            try:
                output = (await self.client.infer("identity", {"input": sent}, timeout_s=30))["output"]
            except TensorwayError as error:
                self.errors.append(error)
                await asyncio.sleep(0.05)
                continue
            assert output.tobytes() == sent.tobytes()
            self.answered += 1

    async def more(self, count: int) -> None:
        """Returns once `count` more requests have been answered."""
        target = self.answered + count
        async with asyncio.timeout(RECOVERY_S):
            while self.answered < target:
                await asyncio.sleep(0.01)

    def codes(self) -> Counter[str]:
        return Counter(error.status.name for error in self.errors)


@asynccontextmanager
async def traffic(endpoint: str, callers: int = 8, retries: int = 0) -> AsyncIterator[Traffic]:
    """Load that goes on while the block runs. A wrong answer fails the block."""
    async with AsyncClient(endpoint, retries=retries) as client, asyncio.TaskGroup() as tasks:
        running = Traffic(client)
        for number in range(callers):
            tasks.create_task(running.call(number))
        await running.more(50)
        yield running
        running.is_over = True


def identity_with_replicas(folder: Path, replicas: int) -> Path:
    """A models directory that holds identity with as many replicas."""
    shutil.copytree(MODELS / "identity", folder / "identity", ignore=shutil.ignore_patterns("__pycache__"))
    model = folder / "identity" / "model.yaml"
    model.write_text(f"{model.read_text()}\nreplicas: {replicas}\n")
    return folder


def is_alive(pid: int) -> bool:
    """False once a process has ended and been reaped."""
    return Path(f"/proc/{pid}").exists()


async def wait_gone(*pids: int) -> None:
    async with asyncio.timeout(20):
        while any(map(is_alive, pids)):
            await asyncio.sleep(0.02)


async def test_a_killed_rank_costs_no_answer_and_comes_back(tmp_path: Path) -> None:
    """One group only: its requests wait for the next epoch, or fail fast with UNAVAILABLE; none is wrong, none hangs."""
    async with running_mesh(tmp_path, "identity") as mesh, traffic(mesh.endpoint) as load:
        (before,) = await mesh.leaders()
        pid = int(before.metadata["pid"])
        os.kill(pid, signal.SIGKILL)
        await wait_gone(pid)
        await load.more(50)
        (after,) = await mesh.wait_members(GROUP, 1)
        assert (after.id, int(after.metadata["epoch"])) == (before.id, 2)
        assert set(load.codes()) <= {"UNAVAILABLE"}


async def test_with_a_second_replica_a_killed_rank_is_not_even_noticed(tmp_path: Path) -> None:
    models = identity_with_replicas(tmp_path / "models", 2)
    async with running_mesh(tmp_path, "identity", models_dir=models, nodes=2) as mesh:
        first, second = await mesh.wait_members(GROUP, 2)
        assert first.metadata["node"] != second.metadata["node"]
        async with traffic(mesh.endpoint) as load:
            os.kill(int(first.metadata["pid"]), signal.SIGKILL)
            await load.more(200)
            assert not load.errors
        await mesh.wait_members(GROUP, 2)


async def test_a_hung_rank_is_killed_and_replaced(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, "identity", hung_after_s=2.0) as mesh, traffic(mesh.endpoint) as load:
        (before,) = await mesh.leaders()
        pid = int(before.metadata["pid"])
        os.kill(pid, signal.SIGSTOP)
        await wait_gone(pid)
        await load.more(50)
        (after,) = await mesh.leaders()
        assert int(after.metadata["epoch"]) == 2
        assert set(load.codes()) <= {"UNAVAILABLE"}


async def test_a_killed_node_takes_its_ranks_along_and_another_takes_over(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, "identity", nodes=2) as mesh, traffic(mesh.endpoint) as load:
        (group,) = await mesh.leaders()
        victim = mesh.processes.members[group.metadata["node"]]
        (other,) = {node.id for node in await mesh.members(NODE)} - {group.metadata["node"]}
        # Neither what is no document at all nor the loss of its own takes a node down.
        await mesh.registry.write(f"{NODES}stranger", b"{")
        await mesh.registry.delete(f"{NODES}{other}")
        async with asyncio.timeout(RECOVERY_S):
            async for documents in mesh.registry.watch_documents(NODES):
                if f"{NODES}{other}" in documents:
                    break
        victim.process.kill()
        await wait_gone(int(group.metadata["pid"]))
        await victim.process.wait()
        await load.more(50)
        (heir,) = await mesh.leaders()
        assert heir.metadata["node"] != group.metadata["node"]
        assert set(load.codes()) <= {"UNAVAILABLE"}


async def test_a_killed_orchestrator_costs_no_answer_where_there_are_two(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, "identity", orchestrators=2) as mesh:
        await mesh.wait_members(ORCHESTRATOR, 2)
        async with traffic(mesh.endpoint) as load:
            for name in ("orchestrator-1", "orchestrator-2"):
                victim = mesh.processes.members[name]
                victim.process.kill()
                await victim.process.wait()
                await load.more(100)
                await mesh.start(name, "orchestrator")
                await mesh.wait_members(ORCHESTRATOR, 2)
                await load.more(100)
            assert not load.errors


@pytest.mark.parametrize("service", ["orchestrator", "node"])
async def test_sigterm_under_load_loses_no_request(tmp_path: Path, service: str) -> None:
    models = identity_with_replicas(tmp_path / "models", 2)
    async with running_mesh(tmp_path, "identity", models_dir=models, nodes=2, orchestrators=2) as mesh:
        await mesh.wait_members(GROUP, 2)
        await mesh.wait_members(ORCHESTRATOR, 2)
        async with traffic(mesh.endpoint, callers=16) as load:
            for name in (f"{service}-1", f"{service}-2"):
                member = mesh.processes.members[name]
                await mesh.processes.stop_member(member)
                assert member.process.returncode == 0, member.last_lines()
                await load.more(100)
                await mesh.start(name, service)
                await mesh.wait_members(ORCHESTRATOR if service == "orchestrator" else NODE, 2)
                await mesh.wait_members(GROUP, 2)
                await load.more(100)
            assert not load.errors


async def test_sigterm_to_the_gateway_answers_what_it_has_accepted(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, "resnet50") as mesh, AsyncClient(mesh.endpoint, retries=0) as client:
        pixels = np.zeros((4, 3, 224, 224), np.float32)
        calls = [asyncio.ensure_future(client.infer("resnet50", {"pixel_values": pixels}, timeout_s=60)) for _ in range(8)]
        lane_is_busy = asyncio.ensure_future(client.infer("resnet50", {"pixel_values": pixels}, timeout_s=60))
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        gateway = mesh.processes.members["gateway-1"]
        gateway.process.send_signal(signal.SIGTERM)
        results = await asyncio.gather(*calls, lane_is_busy)
        assert all(result["logits"].shape == (4, 1000) for result in results)
        assert await gateway.process.wait() == 0
        with pytest.raises(Unavailable):
            await client.infer("resnet50", {"pixel_values": pixels}, timeout_s=5)


def usage(pid: int) -> tuple[int, int]:
    """Open descriptors and threads of a process."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


async def service_pids(mesh: Mesh) -> dict[str, int]:
    pids = {name: member.process.pid for name, member in mesh.processes.members.items()}
    (leader,) = await mesh.leaders()
    return {**pids, "rank": int(leader.metadata["pid"])}


async def test_cancelled_vanished_and_answered_requests_leave_nothing_behind(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, "identity") as mesh:
        async def burst(count: int) -> None:
            async with AsyncClient(mesh.endpoint) as client:
                sent = np.ones((1, 1024), np.float32)
                calls = [asyncio.ensure_future(client.infer("identity", {"input": sent})) for _ in range(count)]
                await asyncio.sleep(0.01)
                for call in calls[::3]:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)

        await burst(100)
        pids = await service_pids(mesh)
        before = {name: usage(pid) for name, pid in pids.items()}
        for _ in range(10):
            await burst(200)
        await asyncio.sleep(0.5)
        after = {name: usage(pid) for name, pid in pids.items()}
        for name in pids:
            assert after[name][0] <= before[name][0] + 2, (name, before[name], after[name])
            # grpc's own event engine keeps a few threads more or less.
            assert after[name][1] <= before[name][1] + 4, (name, before[name], after[name])

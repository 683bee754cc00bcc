"""A deadly request in a mesh of real processes: two orchestrators, and ranks that really die of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from tensorway import AsyncClient
from tensorway.errors import ModelFailed
from tensorway.registry.port import GROUP, ORCHESTRATOR, Registration
from tests.integration.conftest import Mesh, running_mesh
from tests.integration.test_faults import is_alive

DEADLY = 13
_YAML = """\
name: mortal
description: Dies of one order, and negates all others.
engine: python
inputs:
  - {name: order, dtype: INT64, shape: [rows]}
outputs:
  - {name: result, dtype: INT64, shape: [rows]}
replicas: 3
threads: 1
"""
#: Half a second: groups of one node that die within a moment of each other accuse nobody.
_MODEL = f"""\
import os
import signal
import time

from tensorway.model import Inputs, Model, Outputs


class Mortal(Model):
    def forward(self, inputs: Inputs) -> Outputs:
        if (inputs["order"] == {DEADLY}).any():
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return {{"result": -inputs["order"]}}
"""


async def ask(orchestrator: Registration, order: int) -> int:
    """Through that orchestrator, and no other."""
    async with AsyncClient(orchestrator.endpoint, retries=0) as client:
        result = (await client.infer("mortal", {"order": np.array([order], np.int64)}, timeout_s=60))["result"]
    return int(result[0])


async def heard(mesh: Mesh, name: str) -> None:
    """Returns once that orchestrator has heard of a find of another."""
    log = mesh.processes.log_dir / f"{name}.log"
    async with asyncio.timeout(30):
        while "another orchestrator has put content in quarantine" not in log.read_text():
            await asyncio.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_deadly_request_takes_two_groups_of_the_mesh_and_not_two_of_each_orchestrator(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "mortal"
    folder.mkdir(parents=True)
    (folder / "model.yaml").write_text(_YAML)
    (folder / "model.py").write_text(_MODEL)
    async with running_mesh(tmp_path, "mortal", models_dir=folder.parent, orchestrators=2) as mesh:
        before = {group.metadata["pid"] for group in await mesh.wait_members(GROUP, 3)}
        one, two = sorted(await mesh.wait_members(ORCHESTRATOR, 2), key=lambda member: member.id)
        assert await ask(two, 1) == -1
        with pytest.raises(ModelFailed, match="died with this request"):
            await ask(one, DEADLY)
        async with asyncio.timeout(30):
            while len(alive := [pid for pid in before if is_alive(int(pid))]) > 1:  # the node has yet to notice
                await asyncio.sleep(0.02)
        (survivor,) = alive
        await heard(mesh, "orchestrator-2")
        for orchestrator in (two, one):
            with pytest.raises(ModelFailed, match="in quarantine"):
                await ask(orchestrator, DEADLY)
        assert await ask(two, 2) == -2
        assert is_alive(int(survivor))

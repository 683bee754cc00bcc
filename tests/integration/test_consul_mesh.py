"""A whole mesh that meets in Consul: found, hurt, drained, and served without Consul, while requests go on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tensorway.registry.port import GATEWAY, GROUP, NODE, ORCHESTRATOR
from tests.consul.agent import dev_agent
from tests.integration.conftest import running_mesh
from tests.integration.test_faults import identity_with_replicas, traffic, wait_gone

pytestmark = pytest.mark.models


@pytest.mark.timeout(240)
async def test_a_mesh_on_consul_loses_no_request(tmp_path: Path) -> None:
    models = identity_with_replicas(tmp_path / "models", 2)
    async with (
        dev_agent(tmp_path / "agent") as agent,
        running_mesh(
            tmp_path, "identity", models_dir=models, orchestrators=2, nodes=2, registry_url=agent.registry_url(), spread_wait_s=3.0
        ) as mesh,
    ):
        groups = await mesh.wait_members(GROUP, 2)
        assert {group.metadata["node"] for group in groups} == {"node-1", "node-2"}
        async with traffic(mesh.endpoint, callers=4) as load:
            agent.stop()
            await asyncio.sleep(4)
            await load.more(50)
            agent.cont()
            assert not load.errors, "the agent hung"

            await agent.restart()  # it has forgotten everything
            await load.more(50)
            for kind, count in ((GATEWAY, 1), (ORCHESTRATOR, 2), (NODE, 2), (GROUP, 2)):
                await mesh.wait_members(kind, count)
            await load.more(50)
            assert not load.errors, "the agent lost its data"

            orchestrator = mesh.processes.members["orchestrator-1"]
            orchestrator.process.kill()
            await orchestrator.process.wait()
            await mesh.wait_members(ORCHESTRATOR, 1)
            await load.more(50)
            assert not load.errors, "an orchestrator was killed"

            await mesh.start("orchestrator-3", "orchestrator")
            await mesh.wait_members(ORCHESTRATOR, 2)
            await mesh.processes.stop_member(mesh.processes.members["orchestrator-2"])
            assert [row.id for row in await mesh.wait_members(ORCHESTRATOR, 1)] == ["orchestrator-3"]
            await load.more(50)
            assert not load.errors, "an orchestrator was drained"

            victim = mesh.processes.members["node-1"]
            (group,) = (group for group in await mesh.leaders() if group.metadata["node"] == "node-1")
            victim.process.kill()
            await victim.process.wait()
            await wait_gone(int(group.metadata["pid"]))
            await mesh.wait_members(NODE, 1)
            heirs = await mesh.wait_members(GROUP, 2)
            assert {heir.metadata["node"] for heir in heirs} == {"node-2"}
            await load.more(50)
            assert not load.errors, "a node was killed"

"""The short form of `python -m tests.chaos`: a small mesh, a few faults, the same checker. And proof that it sees a wrong answer."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from tensorway.registry.port import GATEWAY, ORCHESTRATOR
from tests.chaos.checker import Aims
from tests.chaos.faults import Cut, Kill, Roll, Stop
from tests.chaos.fleet import IDENTITY, LIGHT, MODELS, Fleet
from tests.chaos.leaks import strays
from tests.chaos.load import Mix
from tests.chaos.processes import MARK
from tests.chaos.scenarios import Scenario, obstacle
from tests.chaos.suite import Arena, Pace, open_arena
from tests.chaos.victims import NODE_OF, RANK
from tests.chaos.world import Shape

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

SEED = 3
MIX = Mix(identity=25.0, embedding=0.0, stream=0.0)
PACE = Pace(before_s=0.8, after_s=2.5)
SHAPE = Shape("directory", LIGHT, num_nodes=2)
FAULT_S = 2.5
#: A machine that does other things may answer late, and be slow to settle; what is answered must be right, and nothing may be lost.
AIMS = Aims(late=5, steady=False)
SCENARIOS = (
    Scenario("kill-rank", "SIGKILL of a leader", Kill(RANK + IDENTITY), FAULT_S, AIMS),
    Scenario("kill-orchestrator", "SIGKILL of an orchestrator", Kill(ORCHESTRATOR), FAULT_S, AIMS),
    Scenario("stop-orchestrator", "SIGSTOP of an orchestrator", Stop(ORCHESTRATOR), FAULT_S, AIMS),
    Scenario("cut-orchestrator-node", "partition", Cut(ORCHESTRATOR, NODE_OF + IDENTITY), FAULT_S, AIMS),
    Scenario("cut-gateway-orchestrator", "partition", Cut(GATEWAY, ORCHESTRATOR), FAULT_S, AIMS),
    Scenario("rolling-restart", "every service restarted", Roll(), 0.0, AIMS),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def arena(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Arena]:
    async with open_arena(SHAPE, MIX, SEED, PACE, print, tmp_path_factory.mktemp("logs")) as made:
        yield made


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
async def test_nothing_is_lost_wrong_or_twice(arena: Arena, scenario: Scenario) -> None:
    if why := obstacle(scenario, SHAPE.registry):
        pytest.skip(why)
    outcome = await arena.run(scenario, SEED)
    print(json.dumps({"struck": outcome.struck, "sent": outcome.verdict.sent, "slowest_s": outcome.verdict.slowest_s}))
    assert outcome.misses == [], "\n".join([*outcome.verdict.examples, arena.world.logs()])
    assert outcome.verdict.sent > 50


_LIAR = """
from tensorway.model import Inputs, Model, Outputs


class Liar(Model):
    def __init__(self) -> None:
        self.num_steps = 0

    def forward(self, inputs: Inputs) -> Outputs:
        self.num_steps += 1
        return {"output": inputs["input"].roll(1, 1) if self.num_steps % 10 == 0 else inputs["input"]}
"""


async def test_what_is_wrong_or_lost_or_left_over_is_seen(tmp_path: Path) -> None:
    """A mesh of one of each, whose model answers every tenth step wrongly, and whose only group dies: both aims are missed. A process that
    nobody knows is a stray."""
    shutil.copytree(MODELS / IDENTITY, tmp_path / IDENTITY, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / IDENTITY / "model.py").write_text(_LIAR)
    fleet = Fleet(((IDENTITY, 1),), source=tmp_path)
    shape = Shape("directory", fleet, num_gateways=1, num_orchestrators=1, num_nodes=1)
    async with open_arena(shape, replace(MIX, timeout_s=0.5), SEED, PACE, print) as arena:
        outcome = await arena.run(Scenario("kill-rank", "SIGKILL of the only leader", Kill(RANK + IDENTITY), 1.0), SEED)
        with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={MARK: arena.world.mark}) as stray:
            try:
                assert stray.stdin is not None and stray.stdout is not None
                stray.stdin.write(b"on\n")
                stray.stdin.flush()
                # A process that has only begun shows no environment yet.
                assert stray.stdout.readline() == b"on\n"
                assert await strays(arena.world, 0.6) == [f"process {stray.pid} belongs to nobody"]
            finally:
                stray.kill()
    assert outcome.verdict.wrong > 0
    assert outcome.verdict.lost > 0
    assert outcome.verdict.success < 0.99
    assert {"wrong", "lost"} <= {word for miss in outcome.misses for word in miss.replace(",", "").split()}

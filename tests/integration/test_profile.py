"""What operators ask of a mesh that serves: profiles of whole groups, and other log levels."""

from __future__ import annotations

import asyncio
import gzip
import json
import sysconfig
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tensorway import AsyncClient
from tensorway.client_operations import ProfileProgress, ProfileWish
from tensorway.errors import FailedPrecondition, InvalidRequest, NotFound
from tensorway.registry.port import GROUP
from tensorway.telemetry.ops_service import GET_LOG_LEVEL
from tensorway.transport.channel import AsyncChannel
from tensorway.v1 import ops_pb2
from tests.integration.conftest import Mesh, running_mesh
from tests.integration.generate_world import ask as ask_tokens
from tests.integration.generate_world import small, talk_of
from tests.integration.hurt_groups import ask, is_right, staged

pytestmark = [pytest.mark.models, pytest.mark.asyncio(loop_scope="module")]


@dataclass
class World:
    """A mesh, and where its processes put temporary files."""

    mesh: Mesh
    temporary: Path
    pipeline: str
    tokens: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("profile")
    models, temporary = folder / "models", folder / "temporary"
    temporary.mkdir()
    names = (staged(models, 2, 1), small(models, "tokens", num_layers=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        async with running_mesh(folder, *names, models_dir=models) as mesh:
            yield World(mesh, temporary, *names)


@asynccontextmanager
async def busy(world: World) -> AsyncIterator[list[int]]:
    """Requests one after another; their number so far. Each must be answered right."""
    num_right = [0]

    async def load() -> None:
        async with AsyncClient(world.mesh.endpoint) as client:
            while True:
                inputs = ask((0, 0, 0))
                assert is_right(inputs, (await client.infer(world.pipeline, inputs))["y"])
                num_right[0] += 1

    async with asyncio.TaskGroup() as tasks:
        loading = tasks.create_task(load())
        yield num_right
        loading.cancel()


async def gathered(client: AsyncClient, wish: ProfileWish) -> tuple[list[ProfileProgress], dict[str, Any]]:
    """Progress, and the trace."""
    progress: list[ProfileProgress] = []
    content = b""
    async with aclosing(client.profile(wish)) as replies:
        async for reply in replies:
            if isinstance(reply, bytes):
                assert len(reply) <= 1 << 20
                content += reply
            else:
                progress.append(reply)
    return progress, json.loads(gzip.decompress(content))


def operators(trace: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """Recorded operators by process."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("cat") == "cpu_op":
            found[event["pid"]].append(event)
    return found


def labels(trace: dict[str, Any]) -> dict[int, str]:
    """Names of the processes."""
    return {event["pid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}


async def test_every_rank_of_a_busy_group_is_recorded(world: World) -> None:
    async with AsyncClient(world.mesh.endpoint) as client, busy(world) as num_right:
        before = num_right[0]
        progress, trace = await gathered(client, ProfileWish(world.pipeline, num_steps=5, with_shapes=True))
        assert num_right[0] > before
    assert labels(trace) == {0: "rank 0 (stage 0, shard 0)", 1: "rank 1 (stage 1, shard 0)"}
    by_rank = operators(trace)
    assert by_rank.keys() == {0, 1}
    for events in by_rank.values():
        linear = [event for event in events if event["name"] == "aten::linear"]
        # Two layers a stage with two linears each, in every step.
        assert len(linear) >= 5 * 4 - 4
        assert all("Input Dims" in event["args"] for event in linear)
    # One clock: a step's second stage follows its first.
    first, second = ([event["ts"] for event in by_rank[rank] if event["name"] == "aten::linear"] for rank in (0, 1))
    assert abs(min(first) - min(second)) < 30e6
    assert max(second) > min(first)
    assert progress[0].state == "recording"
    assert [one.state for one in progress[-2:]] == ["gathering", "done"]
    assert progress[-1].num_steps == progress[-1].num_wanted == 5


async def test_an_idle_group_says_that_it_did_nothing(world: World) -> None:
    async with AsyncClient(world.mesh.endpoint) as client:
        with pytest.raises(FailedPrecondition, match=r"ran no step in 0\.5 s; send requests"):
            await gathered(client, ProfileWish(world.pipeline, max_s=0.5))
    assert not list(world.temporary.glob("tensorway-profile-*"))


async def test_what_is_recorded_when_the_time_is_over_is_the_answer(world: World) -> None:
    async with AsyncClient(world.mesh.endpoint) as client, talk_of(world.mesh) as talk:
        waiting = client.profile(ProfileWish(world.tokens, num_steps=1000, max_s=1.5))
        async with aclosing(waiting) as replies:
            first = await anext(replies)
            assert isinstance(first, ProfileProgress)
            await talk.answer(ask_tokens(world.tokens, (5, 6, 7), 6))
            content = b"".join([reply async for reply in replies if isinstance(reply, bytes)])
    trace = json.loads(gzip.decompress(content))
    assert labels(trace) == {0: "rank 0"}
    assert "aten::argmax" in {event["name"] for event in operators(trace)[0]}


async def test_a_second_profile_is_refused_and_a_cancelled_one_leaves_nothing(world: World) -> None:
    (group,) = [row for row in await world.mesh.members(GROUP) if row.metadata["model"] == world.pipeline]
    async with AsyncClient(world.mesh.endpoint) as client:
        async with aclosing(client.profile(ProfileWish(group=group.id, num_steps=1000, max_s=60.0))) as replies:
            first = await anext(replies)
            assert isinstance(first, ProfileProgress)
            assert (first.group, first.num_steps, first.state) == (group.id, 0, "recording")
            with pytest.raises(FailedPrecondition, match="being profiled already"):
                await gathered(client, ProfileWish(world.pipeline, num_steps=1))
        # The one that was closed is over as soon as its leader hears of it.
        async with busy(world), asyncio.timeout(30):
            while True:
                try:
                    _, trace = await gathered(client, ProfileWish(world.pipeline, num_steps=2))
                    break
                except FailedPrecondition:
                    await asyncio.sleep(0.02)
        assert operators(trace).keys() == {0, 1}
    assert not list(world.temporary.glob("tensorway-profile-*"))


async def test_wishes_that_cannot_be_met_are_named(world: World) -> None:
    async with AsyncClient(world.mesh.endpoint) as client:
        with pytest.raises(NotFound, match="nobody"):
            await gathered(client, ProfileWish("nobody"))
        with pytest.raises(NotFound, match="no-group"):
            await gathered(client, ProfileWish(group="no-group"))
        with pytest.raises(InvalidRequest, match="num_steps"):
            await gathered(client, ProfileWish(world.pipeline, num_steps=1001))


async def test_the_command_writes_a_file(world: World, tmp_path: Path) -> None:
    async with busy(world):
        said = await tensorway("profile", world.pipeline, "--steps", "2", "-o", tmp_path / "trace.json.gz", endpoint=world.mesh.endpoint)
    assert "2 steps" in said
    assert "perfetto" in said
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json.gz"]
    assert labels(json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))).keys() == {0, 1}


async def level_of(endpoint: str) -> ops_pb2.GetLogLevelResponse:
    channel = AsyncChannel(endpoint)
    try:
        return ops_pb2.GetLogLevelResponse.FromString((await channel.unary(GET_LOG_LEVEL, b"", 10.0)).response)
    finally:
        await channel.close()


async def test_log_levels_are_changed_for_a_while(world: World) -> None:
    mesh = world.mesh
    (leader,) = [row for row in await mesh.members(GROUP) if row.metadata["model"] == world.pipeline]
    said = await tensorway("logs", "level", "debug", "--for", "1h", endpoint=mesh.endpoint)
    for name in ("gateway-1", "orchestrator-1", "node-1", leader.id):
        assert name in said.replace("\n", "")
    for endpoint in (mesh.endpoint, leader.endpoint):
        level = await level_of(endpoint)
        assert (level.level, level.next_level) == ("debug", "info")
        assert 3000 < level.next_in_seconds <= 3600
    async with AsyncClient(mesh.endpoint) as client:
        await client.infer(world.pipeline, ask((0, 0, 0)), request_id="seen-in-the-logs")
        changes = await client.set_log_level("info", ["gateway-1", leader.id], seconds=0)
        assert {(change.id, change.previous, change.error) for change in changes} == {("gateway-1", "debug", ""), (leader.id, "debug", "")}
        with pytest.raises(InvalidRequest, match="loud"):
            await client.set_log_level("loud")
        with pytest.raises(NotFound, match="nobody"):
            await client.set_log_level("info", ["nobody"])
        # Back by itself.
        await client.set_log_level("error", ["orchestrator-1"], seconds=0.05)
        (orchestrator,) = await mesh.members("orchestrator")
        async with asyncio.timeout(30):
            while (await level_of(orchestrator.endpoint)).level != "info":
                await asyncio.sleep(0.02)
    lines = [json.loads(line) for line in (mesh.processes.log_dir / "gateway-1.log").read_text().splitlines() if "seen-in-the-logs" in line]
    assert [(line["message"], line["model"], line["status"]) for line in lines] == [("request answered", world.pipeline, "OK")]
    # Rank 1 is told by its leader.
    node_log = (mesh.processes.log_dir / "node-1.log").read_text()
    assert '"message": "log level is debug, as the leader\'s"' in node_log


async def tensorway(*words: object, endpoint: str) -> str:
    """Runs the command; returns what it printed."""
    process = await asyncio.create_subprocess_exec(
        Path(sysconfig.get_path("scripts")) / "tensorway", *map(str, words), "--endpoint", endpoint,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )
    said = (await asyncio.wait_for(process.communicate(), 60))[0].decode()
    assert process.returncode == 0, said
    return said

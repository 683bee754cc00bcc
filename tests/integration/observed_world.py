"""A mesh whose services are traced, and what is read of its traces and profiles."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import secrets
import sysconfig
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tensorway import AsyncClient
from tensorway.client_operations import ProfileProgress, ProfileWish
from tests.integration.conftest import TEST_MODELS, Mesh, running_mesh
from tests.integration.generate_world import small
from tests.integration.hurt_groups import ask, is_right, staged
from tests.integration.span_receiver import Received, Receiver, span_receiver

INFER = "tensorway.v1.InferenceService/Infer"
STATE = "vendor=value"
PIPELINE_TREE = f"""\
gateway: {INFER}
  orchestrator: queue
  orchestrator: attempt
    orchestrator: batch
      rank: step
        rank: rank 0
        rank: rank 1"""


@dataclass
class World:
    """A mesh of traced services, what they export, and where its processes put temporary files."""

    mesh: Mesh
    receiver: Receiver
    temporary: Path
    pipeline: str
    tokens: str

    def log(self, member: str) -> list[dict[str, Any]]:
        """The lines that a member has written, its ranks' too where it is a node."""
        text = (self.mesh.processes.log_dir / f"{member}.log").read_text()
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    async def logged(self, member: str, **fields: object) -> dict[str, Any]:
        """The first line of a member that has these fields, once there is one."""
        async with asyncio.timeout(30):
            while True:
                for line in self.log(member):
                    if fields.items() <= line.items():
                        return line
                await asyncio.sleep(0.02)


@asynccontextmanager
async def running_world(folder: Path) -> AsyncIterator[World]:
    """Serves a gate (see `gates`), a pipeline of two stages, and a small model that generates."""
    models, temporary, headers = folder / "models", folder / "temporary", folder / "headers"
    temporary.mkdir()
    headers.write_text("# who we are\nx-tenant: blue\n")
    names = (gates(models), staged(models, 2, 1), small(models, "tokens", num_layers=2))
    async with span_receiver() as receiver:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TENSORWAY_TRACE_ENDPOINT", receiver.endpoint)
            patch.setenv("TENSORWAY_TRACE_HEADERS_FILE", str(headers))
            patch.setenv("TENSORWAY_ZONE", "here")
            patch.setenv("TENSORWAY_TRACE_STEP_DETAIL", "3")
            patch.setenv("TMPDIR", str(temporary))
            async with running_mesh(folder, *names, models_dir=models) as mesh:
                yield World(mesh, receiver, temporary, *names[1:])


def gates(models: Path) -> str:
    """A model of two groups, whose batches leave with three rows, and whose steps end when their files are read."""
    (models / "gate").mkdir(parents=True)
    document = yaml.safe_load((TEST_MODELS / "gate" / "model.yaml").read_text())
    document |= {"batching": {"max_rows": 3, "max_delay_ms": 5000}, "replicas": 2}
    (models / "gate" / "model.yaml").write_text(yaml.safe_dump(document))
    (models / "gate" / "model.py").write_text((TEST_MODELS / "gate" / "model.py").read_text())
    return "gate"


class Caller:
    """What a client sends along, and the ids in it."""

    def __init__(self, *, is_sampled: bool = True) -> None:
        self.trace_id, self.span_id = secrets.token_hex(16), secrets.token_hex(8)
        self.metadata = {"traceparent": f"00-{self.trace_id}-{self.span_id}-{'01' if is_sampled else '00'}", "tracestate": STATE}


def one(spans: list[Received], name: str) -> Received:
    (found,) = [span for span in spans if span.name == name]
    return found


async def spans_of(world: World, caller: Caller, count: int) -> list[Received]:
    """The spans of a trace, once so many have come."""
    await world.receiver.wait(lambda: len(world.receiver.of(caller.trace_id)) >= count)
    return world.receiver.of(caller.trace_id)


async def reader_of(world: World, path: Path, *but: int) -> int:
    """The leader that has a file open, none of `but`, once there is one: its process id."""
    async with asyncio.timeout(60):
        while True:
            pids = {int(leader.metadata["pid"]) for leader in await world.mesh.leaders()} - {*but}
            for pid in pids:
                if _has_open(pid, path):
                    return pid
            await asyncio.sleep(0.02)


def _has_open(pid: int, path: Path) -> bool:
    for entry in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            if os.readlink(entry) == str(path):
                return True
        except FileNotFoundError:
            continue  # closed meanwhile
    return False


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


async def tensorway(*words: object, endpoint: str) -> str:
    """Runs the command; returns what it printed."""
    process = await asyncio.create_subprocess_exec(
        Path(sysconfig.get_path("scripts")) / "tensorway", *map(str, words), "--endpoint", endpoint,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )
    said = (await asyncio.wait_for(process.communicate(), 60))[0].decode()
    assert process.returncode == 0, said
    return said

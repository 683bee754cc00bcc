"""A supervised group of real ranks, and model directories whose ranks misbehave on demand."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tensorway.model_directory import load_directory
from tensorway_worker.devices import DevicePool
from tensorway_worker.group_report import GroupReport
from tensorway_worker.placement import Partner, Replica
from tensorway_worker.settings import NodeSettings
from tensorway_worker.supervisor import GroupSupervisor

WAIT_S = 60.0
_YAML = """
name: chain
engine: python
inputs: [{{name: x, dtype: FP32, shape: [rows, 2]}}]
outputs: [{{name: x, dtype: FP32, shape: [rows, 2]}}]
batching: {{max_rows: 4}}
threads: 1
startup_timeout_s: {startup_timeout_s}
parallel: {parallel}
files: [{{path: weights.safetensors, source: nowhere, sha256: {sha256}}}]
"""
_MODEL = """
import os, sys, time
import torch
from tensorway.model import Model

RANK = int(os.environ["RANK"])

class Grow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.step = torch.nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, value):
        x = value["x"] if isinstance(value, dict) else value
        return x + self.step

class Name(torch.nn.Module):
    def forward(self, value):
        return {"x": value}

class Chain(Model):
    def load(self, context):
        self.layers = [Grow(), Grow(), Name()]
        for index, layer in enumerate(self.layers[:2]):
            context.load_into(layer, "weights.safetensors", prefix=f"{index}.")
        if RANK == int(context.settings.get("rank", -1)):
            print("about to misbehave", flush=True)
            exec(context.settings["code"])

    def stages(self):
        return self.layers

    def forward(self, inputs):
        value = inputs
        for layer in self.layers:
            value = layer(value)
        return value
"""


def chain(folder: Path, parallel: str, code: str = "", rank: int = 1, startup_timeout_s: float = 60.0) -> Path:
    """A model directory of a group cut as `parallel` says, whose rank `rank` runs `code` while it loads."""
    path = folder / "chain"
    weights = path / "files" / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    save_file({f"{index}.step": np.ones(2, np.float32) for index in range(2)}, weights)
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    settings = f"settings: {{rank: {rank}, code: {code!r}}}\n" if code else ""
    (path / "model.yaml").write_text(_YAML.format(parallel=parallel, startup_timeout_s=startup_timeout_s, sha256=sha256) + settings)
    (path / "model.py").write_text(_MODEL)
    return path


@dataclass
class Supervised:
    """A supervisor that runs, and what it has reported."""

    supervisor: GroupSupervisor
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    #: State and detail after each change.
    seen: list[tuple[str, str]] = field(default_factory=list)

    @property
    def report(self) -> GroupReport:
        return self.supervisor.report

    def on_change(self) -> None:
        self.seen.append((self.supervisor.report.state, self.supervisor.report.detail))
        self.changed.set()

    async def until(self, is_so: Callable[[GroupReport], bool]) -> GroupReport:
        async with asyncio.timeout(WAIT_S):
            while not is_so(self.report):
                self.changed.clear()
                await self.changed.wait()
        return self.report

    async def ready(self, epoch: int = 1) -> GroupReport:
        return await self.until(lambda report: report.state == "ready" and report.epoch >= epoch)

    async def failed(self) -> str:
        """Why the first epoch ended."""
        return (await self.until(lambda report: report.state == "backing_off")).reason


@asynccontextmanager
async def supervised(model: Path, folder: Path, partners: tuple[Partner, ...] = (), **settings: object) -> AsyncIterator[Supervised]:
    """A group under supervision, in this process; leaving the block drains it."""
    directory = load_directory(model)
    replica = Replica(directory.yaml.name, directory.spec.revision, 0)
    found = NodeSettings(
        registry=f"directory:{folder / 'registry'}", rank_listen="127.0.0.1:0", heartbeat_s=0.1, grace_s=5.0, **settings  # type: ignore[arg-type]
    )
    supervisor = GroupSupervisor(replica, directory, found, "node-1", DevicePool(()), lambda: None, lambda _: partners)
    running = Supervised(supervisor)
    supervisor.on_change = running.on_change
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(supervisor.run())
        try:
            yield running
        finally:
            task.cancel()


def is_alive(pid: int) -> bool:
    """False once a process has ended and been reaped."""
    return Path(f"/proc/{pid}").exists()


async def gone(*pids: int) -> None:
    async with asyncio.timeout(20):
        while any(map(is_alive, pids)):
            await asyncio.sleep(0.01)

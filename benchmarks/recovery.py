"""How long a group is gone: a rank is killed, and the time until the node has seen it, and until a request is answered again.

Beside it: the bare cost of a cold start, as many processes at once that import torch and the model's library, load their part, run one step
and end. Real node, real signals; a request every 5 ms, each with a deadline of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy
import yaml

from tensorway import AsyncClient
from tensorway.cli.local_mesh import LocalMesh, MemberPlan, flags_of
from tensorway.errors import TensorwayError
from tensorway.process import MALLOC_SETTINGS
from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import GATEWAY, GROUP, NODES

ROOT = Path(__file__).parents[1]
ROUNDS = 3
SHAPES = ((1, 1), (2, 1), (2, 2))
_COLD = """
import sys, torch
from pathlib import Path
from tensorway.model_directory import load_directory
from tensorway_worker.engines import open_engine
torch.set_num_threads(1)
engine = open_engine(load_directory(Path(sys.argv[1])), "cpu")
engine.load()
ids = torch.ones(1, 16, dtype=torch.int64)
engine.run({"input_ids": ids, "attention_mask": ids})
"""


@dataclass(frozen=True)
class Recovered:
    """One death, seconds from the signal."""

    seen_s: float
    serving_s: float


def model_with(folder: Path, pipeline: int, tensor: int) -> Path:
    """A models directory with MiniLM cut like this."""
    target = folder / "models" / "minilm-ids"
    copytree(ROOT / "models" / "minilm-ids", target, symlinks=True)
    document = yaml.safe_load((target / "model.yaml").read_text())
    document["parallel"] = {"pipeline": pipeline, "tensor": tensor}
    (target / "model.yaml").write_text(yaml.safe_dump(document))
    return target.parent


def cold_start_s(world_size: int) -> float:
    """Time of as many processes, started together, until the last has run a step of the whole model and ended."""
    began_s = time.perf_counter()
    command = [sys.executable, "-c", _COLD, str(ROOT / "models" / "minilm-ids")]
    processes = [subprocess.Popen(command, env={**MALLOC_SETTINGS, **os.environ}) for _ in range(world_size)]
    for process in processes:
        if process.wait():
            raise RuntimeError(f"a cold start ended with status {process.returncode}")
    return time.perf_counter() - began_s


@asynccontextmanager
async def mesh_of(folder: Path, models: Path) -> AsyncIterator[tuple[DirectoryRegistry, str]]:
    """A gateway, an orchestrator and a node, and the gateway's endpoint."""
    async with LocalMesh(folder / "logs") as mesh, DirectoryRegistry(folder / "registry") as registry:
        for service, more in (("gateway", {}), ("orchestrator", {}), ("node", {"models_dir": str(models)})):
            flags = {"id": service, "registry": f"directory:{folder / 'registry'}", "listen": "127.0.0.1:0", "ops_listen": "off", **more}
            await mesh.start_member(MemberPlan(service, service, flags_of(flags)))
        async for found in registry.watch(GROUP):
            if found:
                break
        (gateway,) = await registry.registrations(GATEWAY)
        yield registry, gateway.endpoint


async def answer(client: AsyncClient) -> None:
    """Returns once a request is answered."""
    ids = numpy.ones((1, 16), numpy.int64)
    while True:
        try:
            await client.infer("minilm-ids", {"input_ids": ids, "attention_mask": ids}, timeout_s=0.5)
        except TensorwayError:
            await asyncio.sleep(0.005)
        else:
            return


async def kill_and_wait(registry: DirectoryRegistry, client: AsyncClient, rank: int, number: int) -> Recovered:
    """Sends `number` to a rank and measures."""

    async def report() -> dict[str, Any]:
        document = json.loads(await registry.read(f"{NODES}node") or b"{}")
        return dict(document["groups"][0])

    before = await report()
    began_s = time.perf_counter()
    os.kill(before["ranks"][rank]["pid"], number)
    while (await report())["epoch"] == before["epoch"]:  # noqa: ASYNC110 - a document has no event to wait for
        await asyncio.sleep(0.002)
    seen_s = time.perf_counter() - began_s
    await answer(client)
    return Recovered(seen_s, time.perf_counter() - began_s)


async def deaths(pipeline: int, tensor: int) -> list[tuple[str, list[Recovered], list[float]]]:
    """Several deaths of the last rank, by signal, and after each of them a cold start: what else the machine does weighs on both alike."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = model_with(folder, pipeline, tensor)
        async with mesh_of(folder, models) as (registry, endpoint), AsyncClient(endpoint, retries=0) as client:
            await answer(client)
            found: list[tuple[str, list[Recovered], list[float]]] = []
            for number, rounds in ((signal.SIGKILL, ROUNDS), (signal.SIGSTOP, 1)):
                recovered, cold_s = [], []
                for _ in range(rounds):
                    recovered.append(await kill_and_wait(registry, client, pipeline * tensor - 1, number))
                    cold_s.append(await asyncio.to_thread(cold_start_s, pipeline * tensor))
                found.append((number.name, recovered, cold_s))
            return found


async def table() -> list[str]:
    """Rows for benchmarks/groups.md."""
    lines = [
        "MiniLM; medians. Cold start: as many processes at once, each importing, loading the whole model and running one step. A stopped "
        "rank is seen once it has been silent for hung_after_s = 5 s: what comes after that is compared.", "",
        "| shape | signal | seen by the node, s | serving again, s | bare cold start, s | (serving again - seen) / cold start |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for pipeline, tensor in SHAPES:
        for kind, found, cold in await deaths(pipeline, tensor):
            seen_s, serving_s = (statistics.median(values) for values in zip(*((one.seen_s, one.serving_s) for one in found), strict=True))
            cold_s = statistics.median(cold)
            ratio = (serving_s - seen_s) / cold_s
            lines.append(f"| {pipeline} x {tensor} | {kind} | {seen_s:.3f} | {serving_s:.2f} | {cold_s:.2f} | {ratio:.2f} |")
            print(lines[-1], flush=True)
    return lines

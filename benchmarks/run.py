"""`make bench`: measures the running mesh and writes benchmarks/results.md.

    python -m benchmarks.run [--quick] [--only identity,models,large,perf-analyzer]

Starts a mesh of its own (gateway, orchestrator, one node; release settings), drives it with h2load and, where it runs, with perf-analyzer,
and puts the bare model's own rate, measured in the same run, beside each model's figure.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import perf_analyzer, report, workloads
from benchmarks.cpu import CpuClock
from benchmarks.h2load import INFER, Load, LoadFailed, Measured, drive
from benchmarks.workloads import Workload
from tensorway.cli.local_mesh import LocalMesh, MemberPlan, flags_of
from tensorway.process import MALLOC_SETTINGS
from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import GATEWAY, GROUP, NODE, ORCHESTRATOR
from tensorway.transport import AsyncChannel

ROOT = Path(__file__).parent.parent
IDENTITY_LOADS = (Load(1, 3000), Load(8, 10000), Load(64, 30000), Load(256, 30000))
WARM_UP = Load(4, 80)


async def bench(parts: set[str], quick: bool) -> None:
    tables: list[str] = []
    shrink = 10 if quick else 1
    if "identity" in parts:
        tables.append(report.identity_table(await on_mesh("identity", workloads.identity("identity, 4 KiB", 4096), IDENTITY_LOADS, shrink)))
    if "large" in parts:
        rows = []
        for name, size, loads in (
            ("identity, 1 MiB", 1 << 20, (Load(1, 300), Load(8, 1000))), ("identity, 16 MiB", 16 << 20, (Load(1, 40), Load(4, 80))),
        ):
            workload = workloads.identity(name, size)
            rows += [(workload, measured) for measured in await on_mesh("identity", workload, loads, shrink)]
        tables.append(report.large_table(rows))
    if "models" in parts:
        for workload, loads, sizes in (
            (workloads.minilm_32_tokens(), (Load(1, 300), Load(8, 1500), Load(32, 3000)), (1, 8, 16, 32)),
            (workloads.resnet50(), (Load(1, 60), Load(8, 240), Load(32, 480)), (1, 8, 16, 32)),
        ):
            before = bare_rate(workload.model, sizes, quick)
            measured = await on_mesh(workload.model, workload, loads, shrink)
            after = bare_rate(workload.model, sizes, quick)
            tables.append(report.model_table(workload, measured, {size: (before[size], after[size]) for size in before}))
    if "perf-analyzer" in parts:
        tables.append(await on_perf_analyzer(quick))
    report.write(ROOT / "benchmarks" / "results.md", tables, quick)


async def on_mesh(model: str, workload: Workload, loads: tuple[Load, ...], shrink: int, **settings: object) -> list[Measured]:
    """Starts a mesh with one model (`settings` go to every service), and measures it under each load."""
    found: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder:
        async with LocalMesh(Path(folder) / "logs") as mesh, DirectoryRegistry(Path(folder) / "registry") as registry:
            endpoint, cpu = await start(mesh, registry, folder, model, **settings)
            channel = AsyncChannel(endpoint)
            answer = (await channel.unary(INFER, workload.message, 60.0)).response
            await channel.close()
            num_bytes = len(answer) + 5  # and gRPC's prefix
            await drive(endpoint, workload.message, num_bytes, WARM_UP, cpu)
            for load in loads:
                size = Load(load.concurrency, max(load.concurrency * 2, load.num_requests // shrink))
                measured = await drive(endpoint, workload.message, num_bytes, size, cpu)
                print(report.line(workload, measured), flush=True)
                found.append(measured)
    return found


async def start(
    mesh: LocalMesh, registry: DirectoryRegistry, folder: str, model: str, **settings: object
) -> tuple[str, CpuClock]:
    """Starts the three services; returns the gateway's endpoint and the CPU clock of all four processes."""
    shared: dict[str, object] = {
        "registry": f"directory:{folder}/registry", "listen": "127.0.0.1:0", "ops_listen": "127.0.0.1:0", "log_format": "text",
    }
    shared |= settings
    node = {**shared, "models_dir": str(ROOT / "models"), "models": json.dumps([model]), "spread_wait_s": 0.0}
    await mesh.start([
        MemberPlan("gateway", "gateway", flags_of(shared)),
        MemberPlan("orchestrator", "orchestrator", flags_of(shared)),
        MemberPlan("node", "node", flags_of(node)),
    ])
    pids: dict[str, tuple[int, ...]] = {}
    endpoint = ""
    async with asyncio.timeout(120):
        for name, kind in (("gateway", GATEWAY), ("orchestrator", ORCHESTRATOR), ("node", NODE), ("rank", GROUP)):
            async for members in registry.watch(kind):
                if members:
                    pids[name] = tuple(int(member.metadata["pid"]) for member in members)
                    endpoint = members[0].endpoint if kind == GATEWAY else endpoint
                    break
    await asyncio.sleep(0.5)  # the orchestrator's link to the leader
    return endpoint, CpuClock({"gateway": pids["gateway"], "orchestrator": pids["orchestrator"], "worker": pids["node"] + pids["rank"]})


def bare_rate(model: str, sizes: tuple[int, ...], quick: bool) -> dict[int, float]:
    """Rows per second of the bare model by batch size, in a process of its own, with the threads that its rank gets."""
    seconds = "1" if quick else "6"
    command = [sys.executable, "-m", "benchmarks.bare", str(ROOT / "models" / model), str(os.cpu_count() or 1), seconds, *map(str, sizes)]
    # The memory settings that a rank gets: without them the bare model is up to 1.6 times slower at large batches.
    environment = {**os.environ, **MALLOC_SETTINGS, "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment).stdout
    rates = {int(size): rate for size, rate in json.loads(output.splitlines()[-1]).items()}
    print(f"bare {model}: " + ", ".join(f"{size}: {rate:.1f} rows/s" for size, rate in rates.items()), flush=True)
    return rates


async def on_perf_analyzer(quick: bool) -> str:
    with tempfile.TemporaryDirectory() as folder:
        async with LocalMesh(Path(folder) / "logs") as mesh, DirectoryRegistry(Path(folder) / "registry") as registry:
            endpoint, _ = await start(mesh, registry, folder, "identity")
            rows = [await perf_analyzer.measure(endpoint, "identity", concurrency, quick) for concurrency in (1, 8, 64)]
    return report.perf_analyzer_table(rows)


def main(
    quick: Annotated[bool, typer.Option(help="A tenth of the requests, for a look.")] = False,
    only: Annotated[str, typer.Option(help="Parts to run, by comma.")] = "identity,large,models,perf-analyzer",
) -> None:
    """Measure the mesh and write benchmarks/results.md."""
    try:
        asyncio.run(bench({part.strip() for part in only.split(",")}, quick))
    except LoadFailed as error:
        print(f"bench: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    typer.run(main)

"""`python -m benchmarks.tokens` (make bench-tokens): tokens through the whole mesh beside the bare engine and transformers. Writes
benchmarks/tokens.md.

Every figure is taken beside its counterparts in the same run, on the same cores; the bare engine before and after the mesh. The load
generator is a process of its own on those cores, too.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cpu import CpuClock
from benchmarks.report import machine
from benchmarks.token_workload import MODEL, ROOT, ROUNDS, model_directory
from tensorway.cli.local_mesh import LocalMesh, MemberPlan, flags_of
from tensorway.process import MALLOC_SETTINGS
from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import GATEWAY, GROUP, NODE, ORCHESTRATOR

CONCURRENCIES = tuple(ROUNDS)
LONG_PROMPT_STREAMS = 8
LONG_PROMPT_SECONDS = 20.0
Figures = dict[str, float]


def bare(kind: str, directory: Path, concurrencies: tuple[int, ...] = ()) -> Any:
    """What `benchmarks.bare_generation` prints."""
    threads = str(os.cpu_count() or 1)
    command = [sys.executable, "-m", "benchmarks.bare_generation", kind, str(directory), threads, *map(str, concurrencies)]
    # The engine has the memory settings that a rank has; transformers runs as its users run it.
    environment = {**os.environ, **(MALLOC_SETTINGS if kind == "engine" else {}), "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"bare {kind}: {found}", flush=True)
    return found


class TokenMesh:
    """A mesh of its own for one model directory."""

    def __init__(self, folder: Path, models: Path, num_groups: int = 1) -> None:
        self._folder = folder
        self._models = models
        self._num_groups = num_groups
        self.endpoint = ""
        self.cpu = CpuClock({})

    async def start(self, mesh: LocalMesh, registry: DirectoryRegistry) -> None:
        shared: dict[str, object] = {
            "registry": f"directory:{self._folder}/registry", "listen": "127.0.0.1:0", "ops_listen": "127.0.0.1:0", "log_format": "text",
        }
        await mesh.start([
            MemberPlan("gateway", "gateway", flags_of(shared)),
            MemberPlan("orchestrator", "orchestrator", flags_of(shared)),
            MemberPlan("node", "node", flags_of({**shared, "models_dir": str(self._models), "spread_wait_s": 0.0})),
        ])
        pids: dict[str, tuple[int, ...]] = {}
        wanted = {GATEWAY: 1, ORCHESTRATOR: 1, NODE: 1, GROUP: self._num_groups}
        async with asyncio.timeout(180):
            for kind, count in wanted.items():
                async for members in registry.watch(kind):
                    if len(members) >= count:
                        pids[kind] = tuple(int(member.metadata["pid"]) for member in members)
                        self.endpoint = members[0].endpoint if kind == GATEWAY else self.endpoint
                        break
        await asyncio.sleep(0.5)  # the orchestrator's links to the leaders
        self.cpu = CpuClock({"gateway": pids[GATEWAY], "orchestrator": pids[ORCHESTRATOR]})

    async def load(self, kind: str, concurrency: int, seconds: float = 0.0) -> tuple[Figures, dict[str, float]]:
        """What `benchmarks.token_load` prints, and the CPU of gateway and orchestrator for each token, microseconds."""
        before = self.cpu.read()
        command = [sys.executable, "-m", "benchmarks.token_load", self.endpoint, kind, str(concurrency), str(seconds)]
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
        output, _ = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"the load of {kind} failed")
        found: Figures = json.loads(output.splitlines()[-1])
        after = self.cpu.read()
        print(f"mesh {kind} {concurrency}: {found}", flush=True)
        return found, {name: (after[name] - before[name]) / 1e3 / found["num_tokens"] for name in after}


async def on_mesh(folder: Path, models: Path, loads: list[tuple[str, int, float]], num_groups: int = 1) -> list[Any]:
    """Starts a mesh, and measures it under each load."""
    async with LocalMesh(folder / "logs") as mesh, DirectoryRegistry(folder / "registry") as registry:
        started = TokenMesh(folder, models, num_groups)
        await started.start(mesh, registry)
        return [await started.load(*load) for load in loads]


def steady(dtype: str) -> list[str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        directory = model_directory(folder / "models", dtype)
        before = bare("engine", directory, CONCURRENCIES)
        on = asyncio.run(on_mesh(folder, folder / "models", [("steady", count, 0.0) for count in CONCURRENCIES]))
        after = bare("engine", directory, CONCURRENCIES)
        generate = bare("generate", directory, CONCURRENCIES)
        continuous = bare("continuous", directory, CONCURRENCIES)
        bounds = bare("bandwidth", directory)
    lines = [
        "| streams | mesh tokens/s | bare engine, before and after | mesh / bare | `generate` | engine / `generate` | "
        "transformers' continuous batching | first token p50, p99 ms | between tokens p50, p99 ms | "
        "gateway + orchestrator CPU µs a token | weights read / copy bandwidth |",
        "| ---: " * 11 + "|",
    ]
    for count, (found, cpu) in zip(CONCURRENCIES, on, strict=True):
        lines.append(_row(count, found, cpu, (before[str(count)], after[str(count)]), generate, continuous, bounds))
    return lines


def _row(
    count: int, found: Figures, cpu: Mapping[str, float], bare_runs: tuple[Figures, Figures], generate: Mapping[str, Figures],
    continuous: Mapping[str, Figures], bounds: Figures,
) -> str:  # fmt: skip
    rates = [one["tokens_per_s"] for one in bare_runs]
    own = sum(rates) / 2
    other = generate[str(count)]["tokens_per_s"]
    # A step reads all weights once and makes a token for each stream.
    share = found["tokens_per_s"] / count * bounds["weights_bytes"] / bounds["copy_bytes_per_s"]
    return (
        f"| {count} | {found['tokens_per_s']:.0f} | {rates[0]:.0f} and {rates[1]:.0f} | {found['tokens_per_s'] / own:.0%} | {other:.0f} | "
        f"{own / other:.2f} | {continuous[str(count)]['tokens_per_s']:.0f} | {found['first_p50_ms']:.0f}, {found['first_p99_ms']:.0f} | "
        f"{found['between_p50_ms']:.0f}, {found['between_p99_ms']:.0f} | {sum(cpu.values()):.0f} | {share:.0%} |"
    )


def long_prompts(dtype: str) -> list[str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_directory(folder / "models", dtype)
        kinds = [(kind, LONG_PROMPT_STREAMS, LONG_PROMPT_SECONDS) for kind in ("alone", "long-prompts")]
        found = asyncio.run(on_mesh(folder, folder / "models", [("steady", 4, 0.0), *kinds]))[1:]
    step_ms = found[0][0]["between_p50_ms"]
    lines = [
        f"| {LONG_PROMPT_STREAMS} streams | tokens/s | between tokens p50 ms | p99 ms | p99 / step |", "| --- | ---: | ---: | ---: | ---: |"
    ]
    for title, (one, _) in zip(("alone", "while prompts of 1 000 tokens keep coming"), found, strict=True):
        lines.append(
            f"| {title} | {one['tokens_per_s']:.0f} | {one['between_p50_ms']:.0f} | {one['between_p99_ms']:.0f} | "
            f"{one['between_p99_ms'] / step_ms:.1f} |"
        )
    return lines


def prefixes(dtype: str) -> list[str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_directory(folder / "models", dtype, replicas=2, threads=1)
        shared, distinct = asyncio.run(on_mesh(folder, folder / "models", [("shared", 1, 0.0), ("distinct", 1, 0.0)], num_groups=2))
    lines = [
        "| system prompt of 1 000 tokens | first token p50 ms | p99 ms | prompt tokens found in the cache |", "| --- | ---: | ---: | ---: |"
    ]
    for name, (found, _) in (("shared by all", shared), ("each its own", distinct)):
        lines.append(f"| {name} | {found['first_p50_ms']:.0f} | {found['first_p99_ms']:.0f} | {found['cached_share']:.0%} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--only", choices=("steady", "long-prompts", "prefixes"), help="one part, printed and not written")
    chosen = parser.parse_args()
    parts = {
        "steady": (f"{MODEL}, prompts of 34 to 49 tokens, 64 new ones", steady),
        "long-prompts": ("Long prompts beside running answers", long_prompts),
        "prefixes": ("Prefix affinity, two groups of one thread each", prefixes),
    }
    if chosen.only:
        print("\n".join(parts[chosen.only][1](chosen.dtype)))
        return
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    text = [f"# Tokens\n\nMeasured by `make bench-tokens` on {today}, weights in {chosen.dtype}.\n\n{machine()}\n"]
    for title, measure in parts.values():
        text.append("\n".join([f"## {title}", "", *measure(chosen.dtype), ""]))
    (ROOT / "benchmarks" / "tokens.md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()

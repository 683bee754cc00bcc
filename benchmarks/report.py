"""The result tables, in Markdown."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.h2load import Measured
from benchmarks.perf_analyzer import Analyzed
from benchmarks.workloads import Workload


def line(workload: Workload, measured: Measured) -> str:
    """One run, for the terminal."""
    cpu = " ".join(f"{name} {value:.0f}" for name, value in measured.cpu_us.items())
    return (
        f"{workload.name}, {measured.load.concurrency} in flight: {measured.requests_per_s:.0f}/s, p50 {measured.p50_ms:.2f} ms, "
        f"p99 {measured.p99_ms:.2f} ms, CPU us {cpu}"
    )


def identity_table(runs: Sequence[Measured]) -> str:
    head = "| in flight | connections | requests/s | p50 ms | p99 ms | gateway CPU µs | orchestrator CPU µs | worker CPU µs | all CPU µs |"
    rows = [
        f"| {run.load.concurrency} | {run.load.connections} | {run.requests_per_s:.0f} | {run.p50_ms:.2f} | {run.p99_ms:.2f} | "
        f"{run.cpu_us['gateway']:.0f} | {run.cpu_us['orchestrator']:.0f} | {run.cpu_us['worker']:.0f} | {run.cpu_total_us:.0f} |"
        for run in runs
    ]
    return _table("identity, 4 KiB (h2load)", head, rows)


def large_table(rows: Sequence[tuple[Workload, Measured]]) -> str:
    head = "| request | in flight | requests/s | GB/s each way | p50 ms | p99 ms | all CPU µs |"
    lines = [
        f"| {workload.name} | {run.load.concurrency} | {run.requests_per_s:.1f} | "
        f"{run.requests_per_s * workload.payload_bytes / 1e9:.2f} | "
        f"{run.p50_ms:.1f} | {run.p99_ms:.1f} | {run.cpu_total_us:.0f} |"
        for workload, run in rows
    ]
    return _table("large tensors (h2load)", head, lines)


def model_table(workload: Workload, runs: Sequence[Measured], bare: dict[int, tuple[float, float]]) -> str:
    best_size, best = max(((size, (before + after) / 2) for size, (before, after) in bare.items()), key=lambda item: item[1])
    head = "| in flight | requests/s | p50 ms | p99 ms | gateway + orchestrator CPU µs | share of the bare model's best |"
    rows = [
        f"| {run.load.concurrency} | {run.requests_per_s:.1f} | {run.p50_ms:.1f} | {run.p99_ms:.1f} | "
        f"{run.cpu_us['gateway'] + run.cpu_us['orchestrator']:.0f} | {run.requests_per_s / best:.0%} |"
        for run in runs
    ]
    sizes = "; ".join(f"{size}: {before:.1f} and {after:.1f}" for size, (before, after) in bare.items())
    note = f"Bare model, rows/s by batch size, before and after: {sizes}. Its best: {best:.1f} at {best_size}."
    return f"{_table(f'{workload.name} (h2load)', head, rows)}\n{note}\n"


def perf_analyzer_table(rows: Sequence[Analyzed]) -> str:
    head = "| in flight | inferences/s | p50 ms | p99 ms |"
    lines = [f"| {row.concurrency} | {row.inferences_per_s:.0f} | {row.p50_ms:.2f} | {row.p99_ms:.2f} |" for row in rows]
    return _table("identity, 4 KiB, OIP v2 (perf-analyzer)", head, lines)


def write(path: Path, tables: Sequence[str], quick: bool) -> None:
    """Writes the results with the machine they were measured on."""
    how = "`make bench`" + (" with --quick" if quick else "")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    head = f"# Results\n\nMeasured by {how} on {today}.\n\n{machine()}\n\n"
    path.write_text(head + "\n".join(tables), encoding="utf-8")
    print(f"wrote {path}")


def _table(title: str, head: str, rows: Sequence[str]) -> str:
    ruler = re.sub(r"[^|]+", " ---: ", head)
    return "\n".join([f"## {title}", "", head, ruler, *rows, ""])


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*: (.+)", info)
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    versions = ", ".join(f"{name} {version(name)}" for name in ("grpcio", "torch", "transformers", "uvloop"))
    return (
        f"Machine: {found[1] if found else 'unknown CPU'}, {os.cpu_count()} shared cores, "
        f"{int(memory[1]) // 2**20 if memory else 0} GiB, "
        f"Linux {platform.release().split('-')[0]}, CPython {platform.python_version()}; {versions}. "
        "The load generator runs on the same cores."
    )

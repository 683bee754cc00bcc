"""`python -m benchmarks.choices`: what links over a local socket are worth against gRPC streams, in turn, A B A B, in one run.

Writes benchmarks/choices.md.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks import workloads
from benchmarks.h2load import Load, Measured
from benchmarks.run import on_mesh

HEAD = ("| choice | in flight | requests/s | p50 ms | p99 ms | all CPU µs |", "| --- | ---: | ---: | ---: | ---: | ---: |")
ROUNDS = 2


def rows(choice: str, runs: list[Measured]) -> list[str]:
    return [
        f"| {choice} | {run.load.concurrency} | {run.requests_per_s:.0f} | {run.p50_ms:.2f} | {run.p99_ms:.2f} | {run.cpu_total_us:.0f} |"
        for run in runs
    ]


async def links() -> list[str]:
    lines = ["identity, 4 KiB:", "", *HEAD]
    workload = workloads.identity("identity, 4 KiB", 4096)
    for name, local in (("local socket", True), ("gRPC stream", False)) * ROUNDS:
        lines += rows(name, await on_mesh("identity", workload, (Load(1, 2000), Load(8, 6000), Load(64, 12000)), 1, local_links=local))
    return lines


async def main() -> None:
    head = ["# Local links against gRPC streams", "", "`python -m benchmarks.choices`; the machine is that of results.md.", ""]
    lines = [*head, *await links()]
    Path(__file__).with_name("choices.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main())

"""`python -m benchmarks.groups` (make bench-groups): what a group of ranks costs over its parts. Writes benchmarks/groups.md.

Every figure is taken beside its bare counterpart, in the same run, on the same cores: a hop beside PyTorch RPC alone, a group's step beside
the sum of its stages measured one after the other with nobody else working, recovery beside a bare start of as many processes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import recovery
from benchmarks.report import machine
from tensorway.process import MALLOC_SETTINGS

ROOT = Path(__file__).parents[1]
KIB, MIB = 1 << 10, 1 << 20
SIZES = (4 * KIB, MIB, 16 * MIB)
ROWS = (1, 32)
MODELS = {
    "minilm-ids": {"input_ids": 30000, "attention_mask": 1},
    "smollm2": {"input_ids": 49000, "attention_mask": 1},
}
SHAPES = ((2, 1), (1, 2), (2, 2))


def run_ranks(commands: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Runs the processes together; the JSON that the first one prints."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=None, text=True,
            env={**MALLOC_SETTINGS, **os.environ},
        )
        for command in commands
    ]
    try:
        output, _ = processes[0].communicate(timeout=600)
        return dict(json.loads(output.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def run_group(pipeline: int, tensor: int, **job: Any) -> dict[str, Any]:
    """One group measured by `benchmarks.group_rank`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        defaults = {"store": f"{folder}/store", "threads": 1, "seconds": 3.0, "part_calls": 30, "model": ""}
        full = {"pipeline": pipeline, "tensor": tensor, **defaults, **job}
        path.write_text(json.dumps(full), encoding="utf-8")
        return run_ranks([("benchmarks.group_rank", str(path), str(rank)) for rank in range(pipeline * tensor)])


def hops(seconds: float) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        bare = run_ranks([("benchmarks.bare_rpc", f"{folder}/store", str(rank), str(seconds), *map(str, SIZES)) for rank in range(2)])
    group = run_group(2, 1, measure=["hop"], sizes=SIZES, seconds=seconds)["hop"]
    lines = ["| bytes each way | PyTorch RPC, p50 ms | group, p50 ms | group / RPC |", "| --- | ---: | ---: | ---: |"]
    for size in SIZES:
        one, other = bare[str(size)] * 1e3, group[str(size)] * 1e3
        lines.append(f"| {size // KIB} KiB | {one:.2f} | {other:.2f} | {other / one:.2f} |")
    return lines


def steps(seconds: float) -> list[str]:
    lines = [
        "| model | rows | shape | threads a rank | step p50 ms | parts alone, ms | group over its parts | single, 2 threads, ms |",
        "| --- | ---: | --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for model, inputs in MODELS.items():
        common = {"model": str(ROOT / "models" / model), "inputs": inputs, "rows": ROWS, "measure": ["steps"], "seconds": seconds}
        single = run_group(1, 1, **{**common, "threads": 2})["steps"]
        for pipeline, tensor in SHAPES:
            found = run_group(pipeline, tensor, **common)["steps"]
            for rows in map(str, ROWS):
                step_s, parts = found[rows]["step_s"], found[rows]["parts_s"]
                shown = " + ".join(f"{part * 1e3:.1f}" for part in parts)
                lines.append(
                    f"| {model} | {rows} | {pipeline} x {tensor} | 1 | {step_s * 1e3:.1f} | {shown} | {step_s / sum(parts) - 1:+.0%} | "
                    f"{single[rows]['step_s'] * 1e3:.1f} |"
                )
                print(lines[-1], flush=True)
    return lines


def throughput(seconds: float) -> list[str]:
    lines = ["| model | micro-batches | batches on their way | rows/s | busy, stage by stage |", "| --- | ---: | ---: | ---: | --- |"]
    for model, inputs in MODELS.items():
        found = run_group(
            2, 1, model=str(ROOT / "models" / model), inputs=inputs, rows=ROWS, measure=["throughput"], seconds=seconds
        )["throughput"]
        for key, one in found.items():
            wanted, in_flight = key.split("/")
            busy = ", ".join(f"{share:.0%}" for share in one["busy"])
            lines.append(f"| {model} | {wanted} | {in_flight} | {one['rows_per_s']:.0f} | {busy} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each figure is taken")
    parser.add_argument("--only", choices=("hops", "steps", "throughput", "recovery"), help="one part, printed and not written")
    chosen = parser.parse_args()
    parts = {
        "hops": ("One hop and back", lambda: hops(chosen.seconds)),
        "steps": ("Steps, 16 tokens a row, one micro-batch", lambda: steps(chosen.seconds)),
        "throughput": ("A pipeline of 2 stages, 32 rows a batch", lambda: throughput(chosen.seconds)),
        "recovery": ("Death and rebirth", lambda: asyncio.run(recovery.table())),
    }
    if chosen.only:
        print("\n".join(parts[chosen.only][1]()))
        return
    text = ["# What a group of ranks costs", "", "`make bench-groups` (`python -m benchmarks.groups`)", "", machine(), ""]
    for title, measure in parts.values():
        text += [f"## {title}", "", *measure(), ""]
    Path(__file__).with_name("groups.md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()

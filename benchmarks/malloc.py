"""`python -m benchmarks.malloc`: what a rank's memory settings do for the bare model; writes benchmarks/malloc.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tensorway.process import MALLOC_SETTINGS

ROOT = Path(__file__).parent.parent
SIZES = (1, 8, 16, 32)


def rates(model: str, settings: dict[str, str]) -> dict[str, float]:
    """Rows per second by batch size with `settings` in the environment."""
    command = [sys.executable, "-m", "benchmarks.bare", str(ROOT / "models" / model), str(os.cpu_count() or 1), "4", *map(str, SIZES)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **settings}).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    lines = ["# malloc settings of a rank", "", "Rows per second of the bare model, by batch size; `python -m benchmarks.malloc`.", ""]
    lines += ["| model | settings | " + " | ".join(map(str, SIZES)) + " |", "| --- | --- |" + " ---: |" * len(SIZES)]
    for model in ("resnet50", "minilm-ids"):
        for name, settings in (("glibc's own", {}), ("a rank's", dict(MALLOC_SETTINGS))) * 2:
            found = rates(model, settings)
            lines.append(f"| {model} | {name} | " + " | ".join(f"{found[str(size)]:.1f}" for size in SIZES) + " |")
            print(lines[-1], flush=True)
    (ROOT / "benchmarks" / "malloc.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

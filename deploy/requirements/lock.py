"""Pins everything that the images install, as pip resolves it today: `make lock` writes base.txt and worker.txt beside this file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
#: What builds our own wheel inside the images.
BUILD = "setuptools>=77"
SETS = {"base": "", "worker": "[worker]"}


def resolved(extras: str) -> dict[str, str]:
    """Version by distribution, in an environment that holds nothing yet."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    command += [f"{ROOT}{extras}", BUILD]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}
    del found["tensorway"]
    return found


def main() -> int:
    """Writes the files; returns the exit status."""
    for name, extras in SETS.items():
        # A local version (torch's "+cpu") says which index it came from, and any index has to do.
        pins = sorted(f"{package.lower()}=={version.partition('+')[0]}" for package, version in resolved(extras).items())
        path = HERE / f"{name}.txt"
        path.write_text("# Made by `make lock`. What the images hold besides Tensorway.\n" + "\n".join(pins) + "\n", encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {len(pins)} packages")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

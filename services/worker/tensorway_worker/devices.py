"""The devices of this machine, found without torch."""

from __future__ import annotations

from pathlib import Path


def cuda_devices() -> tuple[str, ...]:
    """`cuda:N` for every NVIDIA device node of this machine, in order."""
    numbers = sorted(int(path.name.removeprefix("nvidia")) for path in Path("/dev").glob("nvidia[0-9]*"))
    return tuple(f"cuda:{number}" for number in numbers)

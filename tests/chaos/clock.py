"""A wall clock that jumps under a service, as it does when an operator or a time server sets it; the monotonic clock goes on.

The kernel's clock belongs to the whole machine (time namespaces have none of their own), and libfaketime shifts waiting on the monotonic
clock too, so that Python's own lock spins. Hence `clock.c`: a few lines that stand in for what reads the wall clock, and nothing else.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Final

from tests.chaos.processes import Member

_SOURCE: Final = Path(__file__).with_name("clock.c")
_COMPILER: Final = "cc"
_SHIFT: Final = struct.Struct("=q")


def has_compiler() -> bool:
    """Whether the library can be made here."""
    return shutil.which(_COMPILER) is not None


def clock_environment(folder: Path) -> dict[str, str]:
    """What a process needs in its environment for its clock to follow `jump_clock(folder, …)`; makes the library where it is not there."""
    library = folder / "clock.so"
    if not library.exists():
        subprocess.run([_COMPILER, "-O1", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"], check=True, timeout=60)
    if not _shared(folder).exists():
        jump_clock(folder, 0)
    return {"LD_PRELOAD": str(library), "TWCHAOS_CLOCK": str(_shared(folder))}


def jump_clock(folder: Path, seconds: int) -> None:
    """Sets those clocks, at once, to so many seconds from the true time."""
    with _shared(folder).open("r+b" if _shared(folder).exists() else "w+b", buffering=0) as file:
        file.write(_SHIFT.pack(seconds))  # in place: the processes have it mapped


def carry_clock(member: Member, folder: Path) -> None:
    """From its next start on, the clock of a service, and of what it starts, can be made to jump."""
    member.environment = {**member.environment, **clock_environment(folder)}


def drop_clock(member: Member) -> None:
    """From its next start on, its clock is the machine's again."""
    member.environment = {name: value for name, value in member.environment.items() if name not in ("LD_PRELOAD", "TWCHAOS_CLOCK")}


def _shared(folder: Path) -> Path:
    return folder / "clock"

"""The consul binary for tests: `CONSUL_BIN`, `consul` on PATH, or Debian's package unpacked into .tools.

`python -m tests.consul.binary` prints its path, and brings it first where there is none.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.debian import unpack

_TARGET = Path(__file__).resolve().parents[2] / ".tools" / "consul"
#: Debian 12 has no consul; Debian 11 on the same mirror does.
_SUITE = "bullseye"


def find_consul() -> Path | None:
    """The binary that is there already, or None. Raises FileNotFoundError where `CONSUL_BIN` names no file."""
    if named := os.environ.get("CONSUL_BIN"):
        if not Path(named).is_file():
            raise FileNotFoundError(f"CONSUL_BIN is {named!r}, where no file is")
        return Path(named)
    if on_path := shutil.which("consul"):
        return Path(on_path)
    unpacked = _TARGET / "usr" / "bin" / "consul"
    return unpacked if unpacked.is_file() else None


def bring_consul() -> Path:
    """The binary, fetched from Debian's mirror (about 15 MB) where it is not there. Several processes may ask at once."""
    found = find_consul()
    if found is not None:
        return found
    _TARGET.parent.mkdir(parents=True, exist_ok=True)
    with (_TARGET.parent / "consul.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if find_consul() is None:
            # Unpacked beside its place and moved there in one step: an interrupted download is never taken for a binary.
            fresh = _TARGET.with_name("consul.fresh")
            shutil.rmtree(fresh, ignore_errors=True)
            unpack(_SUITE, ("consul",), fresh)
            shutil.rmtree(fresh / "apt")
            shutil.rmtree(_TARGET, ignore_errors=True)
            fresh.rename(_TARGET)
    found = find_consul()
    assert found is not None, "the package holds no usr/bin/consul"
    return found


def main() -> int:
    """Prints the path, or one line that says what to do; returns the exit status."""
    try:
        print(bring_consul())
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"consul: cannot be brought from Debian's mirror ({error}); set CONSUL_BIN to a Consul binary", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Fails where the committed stubs are not what protos/ generates now. `python tests/check_stubs.py PYTHON`."""

from __future__ import annotations

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
GRPC_STUBS = ("inference", "model", "mesh", "node", "link", "ops")


def main(python: str) -> int:
    protos = sorted((ROOT / "protos").rglob("*.proto"))
    services = [path for path in protos if path.parent.name == "v1" and path.stem in GRPC_STUBS]
    with tempfile.TemporaryDirectory() as made:
        protoc = [python, "-m", "grpc_tools.protoc", "-I", str(ROOT / "protos")]
        subprocess.run([*protoc, f"--python_out={made}", f"--pyi_out={made}", *map(str, protos)], check=True)
        subprocess.run([*protoc, f"--grpc_python_out={made}", *map(str, services)], check=True)
        fresh = sorted(path for path in Path(made).rglob("*") if path.is_file())
        stale = [path.relative_to(made) for path in fresh if not _is_same(path, ROOT / path.relative_to(made))]
    for path in stale:
        print(f"{path} is not what protos/ generates; run `make protos` and commit it", file=sys.stderr)
    return 1 if stale else 0


def _is_same(fresh: Path, committed: Path) -> bool:
    return committed.is_file() and filecmp.cmp(fresh, committed, shallow=False)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))

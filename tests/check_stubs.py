"""Fails where the committed stubs, or Envoy's descriptor set, are not what protos/ generates now. `python tests/check_stubs.py PYTHON`."""

from __future__ import annotations

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

import google.api

ROOT = Path(__file__).parent.parent
GRPC_STUBS = ("inference", "model", "mesh", "node", "link", "ops")
#: What a client may call through Envoy: REST paths come from the annotations in these.
PUBLIC = ("v1/inference", "v1/model", "v1/mesh", "compat/grpc_service")
#: What errors say in their details; Envoy writes it as JSON.
DETAILS = ("google/rpc/status.proto", "google/rpc/error_details.proto")
DESCRIPTORS = "deploy/envoy/tensorway.pb"
#: Where google/api/annotations.proto is: beside the stubs of googleapis-common-protos.
GOOGLEAPIS = Path(next(iter(google.api.__path__))).parents[1]


def main(python: str) -> int:
    protos = sorted((ROOT / "protos").rglob("*.proto"))
    services = [path for path in protos if path.parent.name == "v1" and path.stem in GRPC_STUBS]
    public = [ROOT / "protos" / "tensorway" / f"{name}.proto" for name in PUBLIC]
    with tempfile.TemporaryDirectory() as made:
        protoc = [python, "-m", "grpc_tools.protoc", "-I", str(ROOT / "protos"), "-I", str(GOOGLEAPIS)]
        descriptors = Path(made, DESCRIPTORS)
        descriptors.parent.mkdir(parents=True)
        subprocess.run([*protoc, f"--python_out={made}", f"--pyi_out={made}", *map(str, protos)], check=True)
        subprocess.run([*protoc, f"--grpc_python_out={made}", *map(str, services)], check=True)
        subprocess.run([*protoc, "--include_imports", f"--descriptor_set_out={descriptors}", *map(str, public), *DETAILS], check=True)
        fresh = sorted(path for path in Path(made).rglob("*") if path.is_file())
        stale = [path.relative_to(made) for path in fresh if not _is_same(path, ROOT / path.relative_to(made))]
    for path in stale:
        print(f"{path} is not what protos/ generates; run `make protos` and commit it", file=sys.stderr)
    return 1 if stale else 0


def _is_same(fresh: Path, committed: Path) -> bool:
    return committed.is_file() and filecmp.cmp(fresh, committed, shallow=False)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))

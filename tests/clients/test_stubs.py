"""`make stubs`: what it makes for each language, and what it says where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients import toolchains

EXAMPLES = toolchains.ROOT / "examples" / "clients"


def stubs(language: str, folder: Path) -> Path:
    """What `make stubs LANG=…` makes."""
    out = folder / "stubs" / language
    command = [sys.executable, str(EXAMPLES / "stubs.py"), language, "--out", str(out)]
    environment = {**os.environ, "PATH": toolchains.path()}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=EXAMPLES / "node")
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("language", ["java", "node", "csharp", "rust"])
def test_stubs_of_other_languages_are_made(language: str, tmp_path: Path) -> None:
    """What only a build system of theirs could compile: protoc, and the makers of types, accept it, and every service is there."""
    if language in ("java", "node") and (why := toolchains.lacks(language)):
        pytest.skip(why)
    out = stubs(language, tmp_path)
    made = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    wanted = {
        "java": {"tensorway/v1/InferenceServiceGrpc.java", "tensorway/v1/MeshServiceGrpc.java", "tensorway/v1/ModelServiceGrpc.java"},
        "node": {"inference.ts", "tensorway/v1/InferenceService.ts", "tensorway/v1/MeshService.ts", "tensorway/v1/ModelService.ts"},
        "csharp": {"Tensorway.Client.csproj", "protos/tensorway/v1/inference.proto", "protos/google/api/http.proto"},
        "rust": {"Cargo.toml", "build.rs", "src/lib.rs", "protos/tensorway/v1/inference.proto", "protos/google/api/http.proto"},
    }
    assert wanted[language] <= made


def test_a_missing_tool_is_named_with_the_command_that_brings_it(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "stubs.py"), "go", "--out", str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "PATH": "/nowhere"})
    assert done.returncode == 1
    assert done.stderr == (
        "stubs: protoc-gen-go is not on PATH: go install google.golang.org/protobuf/cmd/protoc-gen-go@latest\n"
    )

"""The command line against a running gateway, and the gateway's own imports."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from tensorway.cli.doctor import doctor
from tensorway.cli.infer import infer
from tensorway.cli.models import models_app
from tensorway.errors import InvalidRequest, NotFound
from tests.contract.gateway.scripted import Mesh, running_mesh

APP = typer.Typer()
APP.command()(infer)
APP.command()(doctor)
APP.add_typer(models_app, name="models")


async def run(mesh: Mesh, *words: str) -> Result:
    """The command in a thread of its own, as it would run in a process of its own."""
    env = {"TENSORWAY_ENDPOINT": mesh.endpoint, "COLUMNS": "160", "TERM": "dumb"}
    return await asyncio.to_thread(CliRunner().invoke, APP, list(words), env=env)


async def test_infer_takes_text_json_arrays_and_files(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[1, 2], [3, 4]], np.float32))
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8not really")
    async with running_mesh(tmp_path) as mesh:
        for words, expected in (
            (("words", "--text", "a", "--text", "b"), {"shouted": ["a", "b"]}),
            (("words", "--input", 'text=["a", "b"]'), {"shouted": ["a", "b"]}),
            (("words", "--input", "text=plain"), {"shouted": ["plain"]}),
            (("words", "--input", f"text=@{tmp_path}/photo.jpg"), {"shouted": [b"\xff\xd8not really".decode(errors="replace")]}),
            (("echo", "--input", f"x=@{tmp_path}/x.npy"), {"y": [[1, 2], [3, 4]]}),
            (("echo", "--input", "x=[1, 2.5]"), {"y": [[1, 2.5]]}),
            (("brain", "--input", "h=[[1.5, -2]]"), {"h2": [[1.5, -2]]}),
            (
                ("mixed", "--input", "a=[[1, 2]]", "--input", "b=[-1]", "--input", "flag=true", "--output", "flag2", "--output", "a2"),
                {"flag2": True, "a2": [[1, 2]]},
            ),
        ):
            result = await run(mesh, "infer", *words, "--json")
            assert result.exit_code == 0, (words, result.output, result.exception)
            assert json.loads(result.output) == expected


async def test_infer_shows_a_table_and_the_timing(tmp_path: Path) -> None:
    async with running_mesh(tmp_path) as mesh:
        result = await run(mesh, "infer", "words", "--text", "hello", "--parameter", "k=2", "--priority", "-5")
        assert result.exit_code == 0, result.output
        assert re.search(r"shouted\W+BYTES\W+\[1\]\W+'hello'", result.output)
        assert "step 0.05 ms" in result.output
        assert "batch of 1 row from 1 request in group-1" in result.output
        assert "k = 2" in result.output
        assert mesh.orchestrators[0].heads[0].priority == -5


@pytest.mark.parametrize(
    ("words", "kind", "says"),
    [
        (("nope", "--text", "a"), NotFound, "models known"),
        (("echo", "--text", "a"), InvalidRequest, "exactly one BYTES input"),
        (("echo", "--input", "x"), InvalidRequest, "write NAME=VALUE"),
        (("echo", "--input", "z=1"), InvalidRequest, "NAME of x"),
        (("echo", "--input", "x=[1", "--json"), InvalidRequest, "neither JSON nor @file"),
        (("echo", "--input", "x=@picture.jpg"), InvalidRequest, "read from .npy files"),
        (("echo", "--input", "x=[[1]]", "--input", "x=[[1]]"), InvalidRequest, "given twice"),
        (("words", "--input", "text=@absent.jpg"), InvalidRequest, "cannot be read"),
        (("words", "--text", "a", "--parameter", "k"), InvalidRequest, "write NAME=VALUE"),
    ],
)
async def test_infer_says_what_is_wrong(tmp_path: Path, words: tuple[str, ...], kind: type[Exception], says: str) -> None:
    async with running_mesh(tmp_path) as mesh:
        result = await run(mesh, "infer", *words)
        assert result.exit_code == 1
        assert isinstance(result.exception, kind)
        assert says in str(result.exception)
        assert mesh.orchestrators[0].heads == []


async def test_models_are_listed_and_shown(tmp_path: Path) -> None:
    async with running_mesh(tmp_path) as mesh:
        for words in (("models",), ("models", "list")):
            result = await run(mesh, *words)
            assert result.exit_code == 0, result.output
            assert re.search(r"echo\W+6563686f0000 \(1\)\W+ready\W+1/1\W+x FP32 \[rows, n\]", result.output)
            assert "→ shouted BYTES [rows]" in result.output
        env = {"COLUMNS": "160", "TERM": "dumb"}
        flagged = await asyncio.to_thread(CliRunner().invoke, APP, ["models", "--endpoint", mesh.endpoint, "list"], env=env)
        assert "shouted" in flagged.output
        shown = (await run(mesh, "models", "show", "mixed")).output
        assert "requests are never joined" in shown
        assert "flag BOOL []" in shown


def test_fetch_brings_files_and_counts_them(tmp_path: Path) -> None:
    directory = tmp_path / "models" / "tiny"
    directory.mkdir(parents=True)
    (tmp_path / "weights").write_bytes(b"abc")
    (directory / "model.yaml").write_text(f"""
name: tiny
engine: python
inputs: [{{name: x, dtype: FP32, shape: [rows]}}]
outputs: [{{name: y, dtype: FP32, shape: [rows]}}]
files: [{{path: w, source: "file://{tmp_path}/weights", sha256: ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad}}]
""")
    for brought in (1, 0):
        result = CliRunner().invoke(APP, ["models", "fetch", str(tmp_path / "models")], env={"COLUMNS": "160"})
        assert result.exit_code == 0, (result.output, result.exception)
        assert f"1 files of 1 models are there and right; {brought} were brought now." in result.output
    assert (directory / "files" / "w").read_bytes() == b"abc"
    result = CliRunner().invoke(APP, ["models", "fetch", str(tmp_path / "models"), "--model", "other"])
    assert isinstance(result.exception, NotFound)


async def test_doctor_finds_what_is_wrong_and_says_what_to_do(tmp_path: Path) -> None:
    async with running_mesh(tmp_path) as mesh:
        result = await run(mesh, "doctor", "--registry", f"directory:{tmp_path}/registry")
        # The scripted mesh has no node, no registered gateway, and groups whose endpoint nobody answers.
        assert result.exit_code == 1
        assert re.search(r"BAD\W+node\W+none is registered\W+start one: tensorway worker", result.output)
        assert re.search(r"BAD\W+group echo-6563686f", result.output)
        assert re.search(r"ok\W+model echo\W+1 of 1 replicas serve", result.output)
        assert re.search(r"ok\W+registry", result.output)


def test_doctor_names_a_registry_and_a_gateway_that_do_not_answer() -> None:
    lost = CliRunner().invoke(APP, ["doctor", "--registry", "zookeeper:x", "--endpoint", "127.0.0.1:1"], env={"COLUMNS": "160"})
    assert lost.exit_code == 1
    assert "expected directory:PATH" in lost.output
    assert "is the endpoint right" in lost.output


def test_the_gateway_imports_no_array_library() -> None:
    code = "import sys, tensorway_gateway.service; print(sorted({'numpy', 'torch', 'transformers'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


def test_every_command_teaches_with_examples() -> None:
    for words, example in ((("infer",), "--text"), (("models",), "fetch models"), (("doctor",), "--endpoint host:8001")):
        output = CliRunner().invoke(APP, [*words, "--help"], env={"COLUMNS": "160", "TERM": "dumb"}).output
        assert example in output

"""What the pages and the examples say to type against a mesh works against one: the README's model beside two of ours."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from docs_blocks import Block, blocks
from house_tree import ROOT

SCRIPTS = Path(sys.executable).parent
READY = "Ctrl-C stops it"

pytestmark = [pytest.mark.models, pytest.mark.slow]


@dataclass(frozen=True, slots=True)
class RunningMesh:
    """Where a mesh answers, and the environment of a shell beside it."""

    endpoint: str
    environment: dict[str, str]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the repository, with what pages call localhost:8001 put right."""
        words = [word.replace("localhost:8001", self.endpoint) for word in command]
        return subprocess.run(words, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)


def free_endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def make_models_dir(folder: Path) -> Path:
    """Three models of ours, and the one that the README has its reader write."""
    for language in ("yaml", "python"):
        for block in blocks(language):
            if block.word("file"):
                path = folder / block.word("file").removeprefix("my-models/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
    for name in ("minilm", "identity", "smollm2-chat"):
        (folder / name).symlink_to(ROOT / "models" / name)
    return folder


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    folder = tmp_path_factory.mktemp("mesh")
    endpoint = free_endpoint()
    command = [
        str(SCRIPTS / "tensorway"), "up", str(make_models_dir(folder / "models")), "--run-dir", str(folder / "run"),
        "--listen", endpoint, "--ops-listen", free_endpoint(),
    ]
    environment = {
        **os.environ, "PATH": f"{SCRIPTS}:{os.environ['PATH']}", "TENSORWAY_ENDPOINT": endpoint,
        "TENSORWAY_REGISTRY": f"directory:{folder / 'run' / 'registry'}",
    }
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            shown = ""
            while READY not in shown:
                line = process.stdout.readline()
                assert line, shown
                shown += line
            yield RunningMesh(endpoint, environment)
        finally:
            process.send_signal(signal.SIGINT)
            rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0, rest


def on_a_mesh(language: str) -> list[Block]:
    return [block for block in blocks(language) if block.word("needs") == "mesh"]


@pytest.mark.parametrize("block", on_a_mesh("console"), ids=lambda block: block.place)
def test_commands_work(mesh: RunningMesh, block: Block) -> None:
    *others, last = block.commands
    for command in others:
        done = mesh.run("bash", "-c", command)
        assert done.returncode == 0, f"{block.place}: {command}\n{done.stdout}{done.stderr}"
    done = mesh.run("bash", "-c", last)
    assert (done.returncode != 0) == ("fails" in block.words), f"{block.place}: {last}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("block", on_a_mesh("python"), ids=lambda block: block.place)
def test_python_works(mesh: RunningMesh, block: Block) -> None:
    done = mesh.run(sys.executable, "-W", "error", "-c", block.text)
    assert done.returncode == 0, f"{block.place}:\n{done.stdout}{done.stderr}"


def test_the_readme_model_doubles(mesh: RunningMesh) -> None:
    done = mesh.run("bash", "-c", "tensorway infer doubler --input 'x=[[1, 2, 3]]' --json")
    assert done.stdout.strip() == '{"y": [[2.0, 4.0, 6.0]]}', done.stderr


def test_the_synchronous_example(mesh: RunningMesh) -> None:
    done = mesh.run(sys.executable, "examples/python/client.py", "--endpoint", mesh.endpoint)
    assert done.returncode == 0, done.stderr
    best = done.stdout.splitlines()[0]
    assert "A cat sleeps." in best
    assert "A kitten naps." in best


def test_the_asyncio_example(mesh: RunningMesh) -> None:
    done = mesh.run(sys.executable, "examples/python/async_client.py", "--requests", "20", "--in-flight", "4", "--endpoint", mesh.endpoint)
    assert done.returncode == 0, done.stderr
    counted = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert counted[0] == 20
    assert sum(counted[1:]) == 20


def test_the_stubs_example(mesh: RunningMesh) -> None:
    done = mesh.run(sys.executable, "examples/python/stubs_client.py", "--values", "4", "5", "--endpoint", mesh.endpoint)
    assert done.returncode == 0, done.stderr
    assert "output [1, 2]: 4 5" in done.stdout
    assert "tensorway-timing: queue=" in done.stdout
    refused = mesh.run(sys.executable, "examples/python/stubs_client.py", "--model", "nope", "--endpoint", mesh.endpoint)
    assert refused.returncode == 1
    assert "NOT_FOUND: " in refused.stdout
    assert 'reason: "NOT_FOUND"' in refused.stdout


@pytest.mark.parametrize("example", ["client.py", "async_client.py", "stubs_client.py"])
def test_an_example_says_in_a_line_that_nobody_answers(example: str) -> None:
    command = [sys.executable, f"examples/python/{example}", "--endpoint", "127.0.0.1:1", "--timeout-s", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "onnect" in done.stdout + done.stderr

"""`tensorway up` as a user meets it: ready, Ctrl-C, killed, and every way to start it wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sysconfig
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import GATEWAY, GROUP, NODE, ORCHESTRATOR
from tests.integration.conftest import MODELS, ROOT
from tests.integration.test_faults import is_alive, wait_gone

TENSORWAY = Path(sysconfig.get_path("scripts")) / "tensorway"


def free_endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@asynccontextmanager
async def up(run_dir: Path, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        str(TENSORWAY), "up", str(MODELS), "--listen", free_endpoint(), "--ops-listen", free_endpoint(), "--run-dir", str(run_dir),
        *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=ROOT,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def read_until(process: asyncio.subprocess.Process, words: str) -> str:
    assert process.stdout is not None
    text = ""
    async with asyncio.timeout(90):
        while words not in text:
            line = await process.stdout.readline()
            assert line, text
            text += line.decode()
    return text


async def member_pids(run_dir: Path) -> list[int]:
    async with DirectoryRegistry(run_dir / "registry") as registry:
        members = [member for kind in (GATEWAY, ORCHESTRATOR, NODE, GROUP) for member in await registry.registrations(kind)]
    return [int(member.metadata["pid"]) for member in members]


async def test_ctrl_c_stops_everything_cleanly(tmp_path: Path) -> None:
    async with up(tmp_path, "--model", "identity") as process:
        shown = await read_until(process, "Ctrl-C stops it")
        assert "identity" in shown
        more = await read_until(process, "python -c")
        assert "grpcurl -plaintext" in more
        pids = await member_pids(tmp_path)
        assert len(pids) == 4
        process.send_signal(signal.SIGINT)
        output = (await process.communicate())[0].decode()
        assert process.returncode == 0, output
        assert output.rstrip().endswith("stopped.")
        assert not any(map(is_alive, pids))


async def test_killing_it_leaves_no_orphan(tmp_path: Path) -> None:
    async with up(tmp_path, "--model", "identity") as process:
        await read_until(process, "Ctrl-C stops it")
        pids = await member_pids(tmp_path)
        process.kill()
        await process.wait()
        await wait_gone(*pids)


async def test_a_service_that_ends_ends_it_with_its_last_words(tmp_path: Path) -> None:
    async with up(tmp_path, "--model", "identity") as process:
        await read_until(process, "Ctrl-C stops it")
        pids = await member_pids(tmp_path)
        os.kill(pids[1], signal.SIGKILL)
        output = (await process.communicate())[0].decode()
        assert process.returncode == 1
        assert "orchestrator ended with status -9" in output
        await wait_gone(*pids)


@pytest.mark.models
async def test_the_demo_shows_real_answers(tmp_path: Path) -> None:
    async with up(tmp_path, "--model", "minilm", "--model", "efficientnet-lite0", "--demo", "--exit-after-demo") as process:
        output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    assert "cosine similarity" in output
    assert "palace" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nothing"], "nothing"),
        (["--listen", "TAKEN", "--model", "identity"], "cannot be bound"),
        (["--listen", "no-port", "--model", "identity"], "cannot be bound"),
    ],
)
async def test_what_is_wrong_is_said_in_one_sentence(tmp_path: Path, arguments: list[str], words: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        taken_endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        async with up(tmp_path, *(word.replace("TAKEN", taken_endpoint) for word in arguments)) as process:
            output = (await process.communicate())[0].decode()
    assert process.returncode == 1
    assert words in output
    assert "Traceback" not in output


async def test_a_broken_model_names_every_bad_field(tmp_path: Path) -> None:
    models = tmp_path / "models" / "broken"
    models.mkdir(parents=True)
    (models / "model.yaml").write_text("name: broken\nengine: tensorflow\ninputs: [{name: x, dtype: FP33, shape: [rows]}]\n")
    process = await asyncio.create_subprocess_exec(
        str(TENSORWAY), "up", str(models.parent), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output = " ".join((await process.communicate())[0].decode().split())
    assert process.returncode == 1
    for word in ("engine", "FP33", "outputs", "model.yaml"):
        assert word in output


async def test_a_model_that_cannot_load_says_why(tmp_path: Path) -> None:
    models = tmp_path / "models" / "sad"
    models.mkdir(parents=True)
    (models / "model.yaml").write_text(
        "name: sad\nengine: python\ninputs: [{name: x, dtype: FP32, shape: [rows]}]\noutputs: [{name: y, dtype: FP32, shape: [rows]}]\n"
    )
    (models / "model.py").write_text(
        "from tensorway.model import Model\nclass Sad(Model):\n"
        "    def load(self, context):\n        raise OSError('weights are on strike')\n"
        "    def forward(self, inputs):\n        return inputs\n"
    )
    process = await asyncio.create_subprocess_exec(
        str(TENSORWAY), "up", str(models.parent), "--listen", free_endpoint(), "--ops-listen", free_endpoint(), "--run-dir", str(tmp_path),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )
    output = " ".join((await asyncio.wait_for(process.communicate(), 90))[0].decode().split())
    assert process.returncode == 1
    assert "weights are on strike" in output

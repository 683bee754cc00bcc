"""The examples in other languages, built from fresh stubs and run against a real mesh."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from tests.clients import toolchains
from tests.clients.test_stubs import EXAMPLES, stubs
from tests.integration.conftest import Mesh, running_mesh

pytestmark = [pytest.mark.models, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]

LANGUAGES = ("node", "ruby", "cpp", "go")
#: Greedy, so the same in every language.
ANSWER = "The answer to this question lies in the"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    async with running_mesh(tmp_path_factory.mktemp("mesh"), "identity", "smollm2-chat") as made:
        yield made


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """How each example is started. Those that are compiled are compiled side by side."""
    folder = tmp_path_factory.mktemp("clients")
    with ExitStack() as stack:
        starts = {"cpp": start_cpp, "go": start_go}
        builds = {language: stack.enter_context(start(folder)) for language, start in starts.items() if not toolchains.lacks(language)}
        found = {"node": ["node", str(EXAMPLES / "node" / "client.mjs")]}
        found |= {language: [str(folder / language / "client")] for language in builds}
        if not toolchains.lacks("ruby"):
            found["ruby"] = ["ruby", "-I", str(stubs("ruby", folder)), str(EXAMPLES / "ruby" / "client.rb")]
        for language, build in builds.items():
            output, _ = build.communicate()
            assert build.returncode == 0, f"{language}:\n{output}"
    return found


def start_cpp(folder: Path) -> subprocess.Popen[str]:
    command = ["make", "-C", str(EXAMPLES / "cpp"), f"STUBS={stubs('cpp', folder)}", f"OUT={folder / 'cpp'}", "OPTIMISE=-O0"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_go(folder: Path) -> subprocess.Popen[str]:
    """With Debian's libraries instead of modules, so that nothing is downloaded."""
    source = folder / "workspace" / "src"
    (source / "client").mkdir(parents=True)
    (source / "tensorway").symlink_to(stubs("go", folder) / "tensorway")
    shutil.copyfile(EXAMPLES / "go" / "main.go", source / "client" / "main.go")
    environment = {**os.environ, "PATH": toolchains.path(), **toolchains.go_environment(source.parent)}
    command = ["go", "build", "-o", str(folder / "go" / "client"), "."]
    return subprocess.Popen(command, cwd=source / "client", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(params=LANGUAGES)
def command(request: pytest.FixtureRequest, commands: dict[str, list[str]]) -> list[str]:
    if why := toolchains.lacks(request.param):
        pytest.skip(why)
    return commands[request.param]


async def run(command: list[str], mesh: Mesh, *words: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run, [*command, *words, "--endpoint", mesh.endpoint], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PATH": toolchains.path()},
    )


async def test_one_request(command: list[str], mesh: Mesh) -> None:
    done = await run(command, mesh, "infer", "--values", "1,2.5,-3", "--timeout-s", "30")
    assert (done.stdout, done.returncode) == ("output [1, 3]: 1 2.5 -3\n", 0), done.stderr


async def test_one_stream(command: list[str], mesh: Mesh) -> None:
    done = await run(command, mesh, "generate", "--max-tokens", "8", "--timeout-s", "60")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ANSWER
    assert "8 tokens" in done.stderr


async def test_a_deadline_that_cannot_be_kept(command: list[str], mesh: Mesh) -> None:
    done = await run(command, mesh, "generate", "--max-tokens", "2000", "--timeout-s", "0.5")
    assert done.returncode == 1
    assert "DEADLINE_EXCEEDED: " in done.stderr


async def test_the_details_of_an_error(command: list[str], mesh: Mesh) -> None:
    done = await run(command, mesh, "infer", "--model", "nope", "--timeout-s", "30")
    assert done.returncode == 1
    sentence, *details = done.stderr.splitlines()
    assert sentence.startswith("NOT_FOUND: model 'nope' is unknown here")
    assert details == ["reason: NOT_FOUND", "field: model"]

"""`tensorway adapt` on a real mesh: a new model that does what the training wanted, beside an old one that never noticed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tensorway import AsyncClient
from tensorway.registry.port import NODE
from tests.integration.conftest import MODELS, Mesh, running_mesh

TENSORWAY = str(Path(sys.executable).parent / "tensorway")
WAIT_S = 90.0
ROWS = 12


def models_dir(folder: Path) -> Path:
    """A models directory with minilm-ids as a pipeline of two."""
    path = folder / "models" / "minilm-ids"
    shutil.copytree(MODELS / "minilm-ids", path)
    with (path / "model.yaml").open("a") as out:
        out.write("parallel: {pipeline: 2, verify: 'off'}\nthreads: 1\n")
    return path.parent


def examples(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray, Path]:
    """Inputs, the directions that their embeddings are to move in, and the data file that says so."""
    generator = np.random.default_rng(0)
    ids = generator.integers(1000, 20_000, (ROWS, 8))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    wanted = generator.normal(size=(ROWS, 384)).astype(np.float32)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    data = folder / "data.safetensors"
    save_file({**{f"inputs.{name}": value for name, value in inputs.items()}, "targets.embedding": wanted}, data)
    return inputs, wanted, data


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


async def adapt(*words: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        TENSORWAY, "adapt", "minilm-ids", *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT, env={**os.environ, "COLUMNS": "200"},
    )


async def said(process: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(WAIT_S):
        output, _ = await process.communicate()
    return output.decode()


async def embedding(mesh: Mesh, model: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    async with AsyncClient(mesh.endpoint) as client:
        return (await client.infer(model, inputs, timeout_s=30))["embedding"]


def similarity(found: np.ndarray, wanted: np.ndarray) -> float:
    return float((found * wanted).sum(1).mean())


@pytest.mark.models
@pytest.mark.timeout(240)
async def test_an_adapted_model_serves_beside_the_untouched_one(tmp_path: Path) -> None:
    source = models_dir(tmp_path)
    inputs, wanted, data = examples(tmp_path)
    files = contents(source)
    async with running_mesh(tmp_path, "minilm-ids", models_dir=source, allow_adaptation="true") as mesh:
        before = await embedding(mesh, "minilm-ids", inputs)
        process = await adapt(
            "--registry", mesh.registry_url, "--data", str(data), "--loss", "cosine", "--steps", "6", "--learning-rate", "5e-4",
            "--batch-rows", "12", "--new-model", "tuned",
        )  # fmt: skip
        output = await said(process)
        assert process.returncode == 0, output
        assert "22,713,216 numbers trained" in output
        np.testing.assert_array_equal(await embedding(mesh, "minilm-ids", inputs), before)
    assert contents(source) == files
    (made,) = (tmp_path / "adapted").iterdir()
    assert f"tensorway up {made.parent}" in output
    async with running_mesh(tmp_path / "again", "tuned", models_dir=tmp_path / "adapted") as mesh:
        after = await embedding(mesh, "tuned", inputs)
    assert similarity(after, wanted) > similarity(before, wanted) + 0.2


@pytest.mark.models
@pytest.mark.timeout(240)
async def test_ctrl_c_leaves_no_rank_and_no_directory_and_a_refusal_is_one_sentence(tmp_path: Path) -> None:
    source = models_dir(tmp_path)
    _, _, data = examples(tmp_path)
    async with running_mesh(tmp_path, "minilm-ids", models_dir=source, allow_adaptation="true") as mesh:
        await mesh.start("node-2", "node", allow_adaptation="false")
        nodes = {node.id: node for node in await mesh.wait_members(NODE, 2)}
        words = ("--data", str(data), "--loss", "cosine", "--steps", "100000", "--learning-rate", "1e-6")
        refused = await said(await adapt(*words, "--node", nodes["node-2"].endpoint))
        assert refused.splitlines()[-1].startswith("tensorway: node node-2 adapts no models: its setting allow_adaptation is false")
        several = await said(await adapt(*words, "--registry", mesh.registry_url))
        assert "choose one with --node" in several

        before = children(int(nodes["node-1"].metadata["pid"]))
        process = await adapt(*words, "--node", nodes["node-1"].endpoint)
        async with asyncio.timeout(WAIT_S):
            while len(children(int(nodes["node-1"].metadata["pid"]))) < len(before) + 2:
                await asyncio.sleep(0.05)
            await asyncio.sleep(3)
        process.send_signal(signal.SIGINT)
        output = await said(process)
        assert process.returncode == 130, output
        assert "Cancelled" in output
        async with asyncio.timeout(10):
            while children(int(nodes["node-1"].metadata["pid"])) != before or list((tmp_path / "adapted").iterdir()):
                await asyncio.sleep(0.05)


def children(pid: int) -> set[int]:
    """Processes that `pid` has started, zombies too."""
    found: set[int] = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(entry.name))
        except OSError:
            continue
    return found

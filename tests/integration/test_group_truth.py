"""Real models cut over real ranks answer what the whole model answers: bit by bit in a pipeline, within a stated tolerance with shards."""

from __future__ import annotations

import asyncio
from pathlib import Path
from shutil import copytree

import numpy
import pytest
import torch
import yaml

from tensorway import AsyncClient
from tensorway.model_directory import load_directory
from tensorway_worker.engines import open_engine
from tensorway_worker.engines.port import Engine
from tensorway_worker.engines.reference import compare
from tests.integration.conftest import MODELS, running_mesh
from tests.unit.worker.smollm2 import whole_engine

pytestmark = [pytest.mark.models, pytest.mark.timeout(400)]

#: Model, stages, shards.
CUTS = (("minilm-ids", 2, 1), ("resnet50", 2, 1), ("smollm2", 2, 1), ("smollm2", 1, 2), ("smollm2", 2, 2))
#: Rows and length of each request.
SIZES = ((1, 9), (3, 21), (2, 5))


def cut_directory(folder: Path, model: str, pipeline: int, tensor: int) -> str:
    """A copy of a model, cut like this; its name."""
    name = f"{model}-{pipeline}x{tensor}"
    target = folder / name
    copytree(MODELS / model, target, symlinks=True)
    document = yaml.safe_load((target / "model.yaml").read_text())
    document |= {"name": name, "threads": 1, "parallel": {"pipeline": pipeline, "tensor": tensor, "micro_batches": 1, "verify": "always"}}
    document |= {"startup_timeout_s": 300}
    (target / "model.yaml").write_text(yaml.safe_dump(document))
    return name


def given(model: str, rows: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 100 + length)
    if model == "resnet50":
        return {"pixel_values": torch.rand(rows, 3, 224, 224, generator=generator)}
    ids = torch.randint(5, 20_000, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def whole(model: str) -> Engine:
    """The uncut model in this process."""
    if model == "smollm2":
        return whole_engine()
    engine = open_engine(load_directory(MODELS / model), "cpu")
    engine.load()
    return engine


def whole_answers(model: str) -> list[dict[str, torch.Tensor]]:
    """By the uncut model, with one thread like the ranks; to the requests of all `SIZES`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        engine = whole(model)
        with torch.inference_mode():
            return [dict(engine.run(given(model, *size))) for size in SIZES]
    finally:
        torch.set_num_threads(threads)


async def test_cut_models_answer_like_whole_ones(mesh_dir: Path) -> None:
    models_dir = mesh_dir / "models"
    names = [cut_directory(models_dir, *cut) for cut in CUTS]
    async with running_mesh(mesh_dir, *names, models_dir=models_dir) as mesh, AsyncClient(mesh.endpoint, timeout_s=60) as client:
        assert mesh.processes.members["node-1"].log.read_text().count("compared with the uncut model") == len(CUTS)
        wanted = {model: await asyncio.to_thread(whole_answers, model) for model in dict.fromkeys(model for model, *_ in CUTS)}
        for (model, _, tensor), name in zip(CUTS, names, strict=True):
            for size, answer in zip(SIZES, wanted[model], strict=True):
                result = await client.infer(name, {key: value.numpy() for key, value in given(model, *size).items()})
                own = {key: torch.from_numpy(numpy.array(result[key])) for key in answer}
                assert compare({**own}, {**answer}, tensor) is None, name

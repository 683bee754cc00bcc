"""A model placed by accelerate gives what the unplaced one gives, in as little memory as it is told to take."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cut_ranks import whole_of
from worker_wire import MODELS

from tensorway.errors import FailedPrecondition
from tensorway.model import Inputs
from tensorway.model_directory import ModelDirectory, load_directory
from tensorway_worker.engines.placed import PlacedEngine, placed_engine
from tensorway_worker.engines.transformers import transformers_engine
from tests.unit.worker.smollm2 import whole_engine

pytestmark = pytest.mark.models

MEGABYTE = 10**6
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def directory(folder: Path, name: str, **settings: Any) -> ModelDirectory:
    """A ready model's directory with other settings and the same files."""
    document = yaml.safe_load((MODELS / name / "model.yaml").read_text())
    document["settings"] |= settings
    document |= {key: document["settings"].pop(key) for key in ("weights_dtype",) if key in document["settings"]}
    (folder / "model.yaml").write_text(yaml.safe_dump(document))
    (folder / "files").symlink_to(MODELS / name / "files")
    return load_directory(folder)


def loaded(folder: Path, name: str, device: str = "cpu", **settings: Any) -> PlacedEngine:
    engine = placed_engine(directory(folder, name, placement="auto", **settings), device)
    with torch.inference_mode():
        engine.load()
    return engine


def inputs() -> Inputs:
    ids = torch.randint(5, 20000, (3, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@cache
def expected(name: str) -> torch.Tensor:
    engine = whole_engine() if name == "smollm2" else whole_of(MODELS / name)
    with torch.inference_mode():
        (output,) = engine.run(inputs()).values()
    return torch.as_tensor(output)


def output(engine: PlacedEngine) -> torch.Tensor:
    with torch.inference_mode():
        (found,) = engine.run(inputs()).values()
    return torch.as_tensor(found)


@pytest.mark.parametrize(
    ("limit", "places", "held"),
    [("200MB", {"cpu"}, 91), ("60MB", {"cpu", "disk"}, 60), ("20MB", {"disk"}, 1), (60_000_000, {"cpu", "disk"}, 60)],
)
def test_minilm_in_less_memory_than_it_has(tmp_path: Path, limit: object, places: set[str], held: int) -> None:
    engine = loaded(tmp_path, "minilm-ids", max_memory={"cpu": limit})
    assert set(engine.device_map.values()) == places
    assert engine.memory_bytes() <= held * MEGABYTE
    for _ in range(2):
        assert torch.equal(output(engine), expected("minilm-ids"))
        # What was fetched for the step is let go of after it.
        assert engine.memory_bytes() <= held * MEGABYTE
    assert list(tmp_path.glob("**/*.dat")) == []


def test_smollm2_with_a_tied_head_partly_in_its_file(tmp_path: Path) -> None:
    engine = loaded(tmp_path, "smollm2", max_memory={"cpu": "300MB"})
    assert set(engine.device_map.values()) == {"cpu", "disk"}
    assert 100 * MEGABYTE < engine.memory_bytes() <= 300 * MEGABYTE
    assert torch.equal(output(engine), expected("smollm2"))


def test_smollm2_all_in_its_file(tmp_path: Path) -> None:
    engine = loaded(tmp_path, "smollm2", max_memory={"cpu": "20MB"})
    assert engine.memory_bytes() < MEGABYTE
    assert torch.equal(output(engine), expected("smollm2"))


def test_weights_dtype_halves_what_is_held(tmp_path: Path) -> None:
    engine = loaded(tmp_path, "minilm-ids", weights_dtype="bfloat16")
    assert engine.memory_bytes() < 46 * MEGABYTE
    assert torch.nn.functional.cosine_similarity(output(engine).float(), expected("minilm-ids"), dim=1).min() > 0.999


def test_text_goes_through_the_tokeniser(tmp_path: Path) -> None:
    import numpy

    engine = loaded(tmp_path, "minilm", max_memory={"cpu": "60MB"})
    assert engine.has_preprocess
    texts = numpy.array([b"A cat sleeps.", b"Shares fell."], dtype=object)
    plain = transformers_engine(load_directory(MODELS / "minilm"), "cpu")
    plain.load()
    values = engine.preprocess({"text": texts}, {})
    with torch.inference_mode():
        assert torch.equal(engine.run(values)["embedding"], plain.run(plain.preprocess({"text": texts}, {}))["embedding"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"placement": "balanced"}, "settings.placement must be auto, got 'balanced'"),
        ({"max_memory": "10GB"}, "settings.max_memory must map devices to sizes"),
        ({"max_memory": {"cpu": "plenty"}}, r"settings.max_memory.cpu: 'plenty' is no size such as 10GB"),
        ({"max_memory": {"cpu": None}}, "is no size such as 10GB"),
        ({"max_memory": {7: "10GB"}}, "this rank sees no device 7, only cpu"),
        ({"architecture": "BertModel"}, "settings.placement needs weights files, not a seed"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(FailedPrecondition, match=said):
        placed_engine(directory(tmp_path, "minilm-ids", **{"placement": "auto", **settings}), "cpu")


def test_what_does_not_fit_is_refused_where_nothing_may_be_left_out(tmp_path: Path) -> None:
    engine = placed_engine(directory(tmp_path, "minilm-ids", placement="auto", max_memory={"cpu": "60MB"}, offload=False), "cpu")
    with pytest.raises(FailedPrecondition, match=r"minilm-ids does not fit into its devices: encoder.*allow settings\.offload"):
        engine.load()


@pytest.mark.gpu
@CUDA
def test_over_a_gpu_the_cpu_and_the_file(tmp_path: Path) -> None:
    engine = loaded(tmp_path, "minilm-ids", "cuda:0", max_memory={0: "70MB", "cpu": "10MB"})
    assert set(engine.device_map.values()) == {0, "cpu", "disk"}
    with torch.inference_mode():
        (found,) = engine.run({name: torch.as_tensor(value).to("cuda:0") for name, value in inputs().items()}).values()
    assert torch.as_tensor(found).device.type == "cuda"
    assert (torch.as_tensor(found).cpu() - expected("minilm-ids")).abs().max() < 1e-4

"""The uncut model in a process of its own, and what counts as the same outputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from cut_ranks import author_directory, author_inputs, chained, stages_of

from tensorway.model import Outputs
from tensorway.model_directory import load_directory
from tensorway.signature import TensorSpec
from tensorway.tensors import DataType
from tensorway_worker.engines import open_engine
from tensorway_worker.engines.reference import compare, load_values, save_values
from tensorway_worker.engines.samples import made_up, sample_inputs


def reference(path: Path, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "tensorway_worker.engines.reference", str(path)]
    files = ["--inputs", str(folder / "in.safetensors"), "--outputs", str(folder / "out.safetensors")]
    return subprocess.run([*program, *files, *more], capture_output=True, text=True, timeout=100, check=False)


def test_the_reference_process_gives_what_the_parts_give(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    path = author_directory(tmp_path / "net")
    inputs = author_inputs(5)
    save_values(inputs, tmp_path / "in.safetensors")
    ran = reference(path, tmp_path, "--threads", str(torch.get_num_threads()))
    assert ran.returncode == 0, ran.stderr
    own = chained([engine.run for engine in stages_of(path, 2)], inputs)
    assert compare(own, load_values(tmp_path / "out.safetensors"), 1) is None
    own["y"] = own["y"].clone()
    own["y"][3, 7] += 1e-3
    said = compare(own, load_values(tmp_path / "out.safetensors"), 1)
    assert said is not None
    assert "output y is not the uncut model's bit by bit: 1 of 250 values differ, by up to 0.001" in said


def test_the_reference_process_says_in_one_sentence_what_went_wrong(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    path = author_directory(tmp_path / "net")
    save_values({"x": torch.tensor([99]), "w": torch.ones(1)}, tmp_path / "in.safetensors")
    ran = reference(path, tmp_path)
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert "the uncut model raised IndexError" in ran.stderr


def outputs(**values: torch.Tensor) -> Outputs:
    return dict(values)


@pytest.mark.parametrize(
    ("found", "wanted", "num_shards", "weights_dtype", "words"),
    [
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), 1, "keep", None),
        (torch.tensor([1.0]), torch.tensor([1.0 + 2e-7]), 1, "keep", "bit by bit: 1 of 1 values differ"),
        (torch.tensor([1.00005, 2000.1]), torch.tensor([1.0, 2000.0]), 2, "keep", None),
        (torch.tensor([1.0002]), torch.tensor([1.0]), 2, "keep", "within 0.0001: 1 of 1 values differ, by up to 0.0002"),
        (torch.tensor([1.02]), torch.tensor([1.0]), 2, "bfloat16", None),
        (torch.tensor([1.1]), torch.tensor([1.0]), 2, "bfloat16", "within 0.05"),
        (torch.tensor([float("nan")]), torch.tensor([1.0]), 2, "keep", "by up to inf"),
        (torch.tensor([3]), torch.tensor([4]), 2, "keep", "bit by bit: 1 of 1 values differ, by up to 1"),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), 2, "keep", r"is torch.float32 [1], the uncut model's torch.float32 [1, 1]"),
    ],
)  # fmt: skip
def test_what_counts_as_the_same(found: torch.Tensor, wanted: torch.Tensor, num_shards: int, weights_dtype: str, words: str | None) -> None:
    said = compare(outputs(y=found), outputs(y=wanted), num_shards, weights_dtype)
    assert said is None if words is None else said is not None and words in said


def test_texts_and_missing_outputs_count(tmp_path: Path) -> None:
    one, other = numpy.array([b"a"], dtype=object), numpy.array([b"b"], dtype=object)
    assert compare({"y": one}, {"y": one.copy()}, 1) is None
    assert compare({"y": one}, {"y": other}, 2) == "output y differs from the uncut model's"
    assert compare({}, {"y": one}, 1) == "the cut model returns [], the uncut one ['y']"


def test_samples_are_seeded_and_real(tmp_path: Path) -> None:
    specs = [
        TensorSpec("input_ids", DataType.INT64, ("rows", "length")), TensorSpec("attention_mask", DataType.INT64, ("rows", "length")),
        TensorSpec("position_ids", DataType.INT64, ("rows", "length")), TensorSpec("pixels", DataType.FP16, ("rows", 3)),
    ]
    made = made_up(specs, 3, 11, {"input_ids": 7})
    assert all(torch.equal(value, made_up(specs, 3, 11, {"input_ids": 7})[name]) for name, value in made.items())
    assert set(made["input_ids"].flatten().tolist()) <= set(range(7))
    assert made["attention_mask"].sum(dim=1).tolist() == [11, 11, 6]
    assert made["position_ids"][2].tolist() == list(range(11))
    assert made["pixels"].dtype == torch.float16
    engine = open_engine(load_directory(author_directory(tmp_path)), "cpu")
    assert sample_inputs(engine, load_directory(tmp_path).spec, 4)["x"].shape == (4,)

"""Token generation on a CUDA device: the tokens of the same model on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "worker"))

from generating import answers, made, prompts

from tensorway_worker.engines.generation.engine import GenerationEngine
from tensorway_worker.engines.generation.requests import Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def opened(folder: Path, device: str, **more: object) -> GenerationEngine:
    engine = GenerationEngine(made(folder, **more), device)
    engine.load()
    return engine


def test_greedy_answers_are_those_of_the_cpu(tmp_path: Path) -> None:
    asked = prompts(12, 40, shared=9)
    wanted = answers(opened(tmp_path, "cpu"), asked, 20)
    assert answers(opened(tmp_path, "cuda:0"), asked, 20) == wanted
    assert answers(opened(tmp_path, "cuda:0"), asked, 20, num_blocks=40) == wanted


def test_drawn_answers_do_not_depend_on_their_neighbours(tmp_path: Path) -> None:
    engine = opened(tmp_path, "cuda:0", weights_dtype="float32")
    asked = prompts(8, 20)
    ways = [Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=number) for number in range(8)]
    together = answers(engine, asked, 15, sampling=ways)
    assert together == [answers(engine, [prompt], 15, sampling=[way])[0] for prompt, way in zip(asked, ways, strict=True)]


def test_steps_as_graphs_draw_the_same(tmp_path: Path) -> None:
    asked = prompts(12, 40)
    settings = made(tmp_path / "plain").yaml.settings
    graphs = opened(tmp_path / "graphs", "cuda:0", settings={**settings, "cuda_graphs": True})
    assert graphs._graphs is not None
    assert answers(graphs, asked, 30) == answers(opened(tmp_path / "plain", "cuda:0"), asked, 30)


def test_bfloat16_answers(tmp_path: Path) -> None:
    found = answers(opened(tmp_path, "cuda:0", weights_dtype="bfloat16"), prompts(6, 40), 20)
    assert all(len(one) == 20 for one in found)

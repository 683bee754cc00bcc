"""A real language model from text: its vocabulary out of the GGUF file, its next token, and what made it choose that token."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from tensorway.model_directory import load_directory
from tensorway_worker.engines import open_engine
from tensorway_worker.rank.explain import Explainer, ExplainOrder
from tensorway_worker.rank.gradient_port import Target
from tensorway_worker.rank.solo import SoloGroup
from tests.unit.worker.smollm2 import transformers_tokenizer

_DIRECTORY = Path(__file__).parents[3] / "models" / "smollm2-text"
_TEXTS = ("The capital of France is", "Überraschung: 水")

pytestmark = [pytest.mark.models, pytest.mark.slow]


def test_text_goes_in_and_the_next_token_is_explained() -> None:
    directory = load_directory(_DIRECTORY)
    engine = open_engine(directory, "cpu")
    with torch.inference_mode(False), torch.no_grad():
        engine.load()
    theirs = transformers_tokenizer()
    for text in _TEXTS:
        inputs = engine.preprocess({"text": numpy.array([text.encode()], dtype=object)}, {})
        assert inputs["input_ids"][0].tolist() == theirs(text)["input_ids"]
    inputs = engine.preprocess({"text": numpy.array([_TEXTS[0].encode()], dtype=object)}, {})
    found = Explainer(SoloGroup(engine), engine, directory.spec).explain(inputs, ExplainOrder("input_x_gradient", "", Target("")))
    assert theirs.decode(found["chosen"].tolist()) == " Paris"
    tokens = [bytes(token).decode() for token in found["tokens"][0]]
    assert "".join(tokens) == _TEXTS[0]
    assert found["attribution"].shape == (1, len(tokens))

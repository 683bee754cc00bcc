"""SmolLM2 for the tests of one session: what is slow to read out of its GGUF file, read once. Import it as `tests.unit.worker.smollm2`
everywhere, so that there is one of it; who wants to change what it returns makes a copy."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from tensorway.model_directory import load_directory
from tensorway_worker.engines import open_engine
from tensorway_worker.engines.port import Engine

DIRECTORY = Path(__file__).parents[3] / "models" / "smollm2"
FILES = DIRECTORY / "files"
WEIGHTS = "smollm2.gguf"


@cache
def transformers_own() -> Any:
    """The model as transformers alone reads it, in float32; its parameters want no gradient."""
    model = transformers.AutoModelForCausalLM.from_pretrained(FILES, gguf_file=WEIGHTS, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@cache
def transformers_tokenizer() -> Any:
    """The tokeniser as transformers alone reads it; pads on the right."""
    return transformers.AutoTokenizer.from_pretrained(FILES, gguf_file=WEIGHTS, padding_side="right")


@cache
def whole_engine() -> Engine:
    """The engine of `models/smollm2`, uncut, on the CPU."""
    engine = open_engine(load_directory(DIRECTORY), "cpu")
    engine.load()
    return engine

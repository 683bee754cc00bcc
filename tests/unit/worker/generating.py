"""Small language models with random weights, and answers made without a mesh: scheduler and engine in one thread."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from tensorway.model import Inputs, Outputs
from tensorway.model_directory import ModelDirectory, load_directory
from tensorway_worker.engines.generation.blocks import BlockPool
from tensorway_worker.engines.generation.engine import GenerationEngine
from tensorway_worker.engines.generation.layout import carried
from tensorway_worker.engines.generation.requests import Sampling
from tensorway_worker.engines.generation.sampler import SamplingRows
from tensorway_worker.engines.generation.scheduler import Limits, Scheduler
from tensorway_worker.engines.generation.scheduler import Sequence as Answer

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 2,
}
#: GPT-2 has names of its own.
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 256, "initializer_range": 0.3, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": 2,
}


def made(folder: Path, architecture: str = "LlamaForCausalLM", config: Mapping[str, Any] = SIZES, **more: Any) -> ModelDirectory:
    """A model directory; `more`: further keys of model.yaml."""
    files = folder / "files"
    files.mkdir(parents=True, exist_ok=True)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(files / "tokenizer.json"))
    (files / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"}')
    document = {
        "name": "tiny", "engine": "transformers", "weights_dtype": "float32",
        "inputs": [{"name": "text", "dtype": "BYTES", "shape": ["rows"]}],
        "outputs": [{"name": "text", "dtype": "BYTES", "shape": ["rows"]}],
        "settings": {"task": "generation", "architecture": architecture, "config": dict(config), "seed": 5},
        "generation": {"kv_cache_mb": 1, "block_tokens": 4, **more.pop("generation", {})}, **more,
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(document))
    return load_directory(folder)


def prompts(count: int, longest: int, seed: int = 3, shared: int = 0) -> list[list[int]]:
    """Token ids at random; `shared`: tokens that all begin with."""
    chance = random.Random(seed)
    beginning = [chance.randrange(3, VOCABULARY) for _ in range(shared)]
    return [beginning + [chance.randrange(3, VOCABULARY) for _ in range(chance.randrange(1, longest))] for _ in range(count)]


def answers(
    engine: GenerationEngine,
    asked: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    run: Callable[[Inputs], Outputs] | None = None,
    sampling: Sequence[Sampling] | None = None,
    limits: Limits | None = None,
    num_blocks: int = 0,
    prefill_tokens: int | None = None,
    arrivals: int = 3,
) -> list[list[int]]:
    """The answers' tokens, with `arrivals` prompts coming in before each step. Runs on until all have `max_tokens`."""
    pool = BlockPool(num_blocks or engine.dimensions.num_blocks, engine.dimensions.block_tokens)
    scheduler = Scheduler(pool, limits or Limits(64, 32))
    waiting = [Answer(number, list(prompt)) for number, prompt in enumerate(asked)]
    all_of_them = list(waiting)
    with torch.inference_mode():
        while True:
            for _ in range(min(arrivals, len(waiting))):
                scheduler.add(waiting.pop(0))
            step = scheduler.next(prefill_tokens)
            if step is None:
                break
            drawing = [row.sequence for row in step.rows if row.draws]
            how = [sampling[one.id] if sampling else Sampling() for one in drawing]
            draws = SamplingRows.of([
                (way, len(one.ids), (), set(one.ids) if way.repetition_penalty != 1.0 else (), None)
                for way, one in zip(how, drawing, strict=True)
            ])
            drawn = (run or engine.run)({**carried(step.rows), **draws.to_tensors()})["token"].tolist()
            scheduler.back(step)
            for one, token in zip(drawing, drawn, strict=True):
                one.ids.append(token)
                if len(one.ids) - len(asked[one.id]) >= max_tokens:
                    scheduler.drop(one)
    assert pool.num_free == pool.num_blocks
    return [one.ids[len(prompt) :] for one, prompt in zip(all_of_them, asked, strict=True)]


def reference(model: Any, prompt: Sequence[int], max_tokens: int, **more: Any) -> list[int]:
    """What transformers' own `generate` makes of it."""
    found = model.generate(
        torch.tensor([list(prompt)]), attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64), max_new_tokens=max_tokens,
        eos_token_id=-1, do_sample=False, **more,
    )
    ids: list[int] = found[0].tolist()
    return ids[len(prompt) :]

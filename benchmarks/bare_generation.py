"""Tokens without a mesh, in one process of its own.

    python -m benchmarks.bare_generation (engine | generate | continuous | bandwidth) MODEL_DIR THREADS CONCURRENCY [CONCURRENCY …]

engine: our engine with its threads, asked by a coroutine for each stream. generate: transformers' `generate` on left-padded batches.
continuous: transformers' continuous batching. bandwidth: what reading all weights once a step allows. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.token_workload import NEW_TOKENS, ROUNDS, Times, prompts
from tensorway.errors import TensorwayError
from tensorway.model_directory import ModelDirectory, load_directory
from tensorway_worker.engines.generation.answer import Advance
from tensorway_worker.engines.generation.blocks import BlockPool
from tensorway_worker.engines.generation.engine import GenerationEngine
from tensorway_worker.engines.generation.generator import Generator
from tensorway_worker.engines.generation.requests import Finish, GenerationRequest, Sampling, StopRules
from tensorway_worker.engines.generation.scheduler import Limits, Scheduler
from tensorway_worker.engines.pretrained import Pretrained
from tensorway_worker.engines.tasks import TASKS
from tensorway_worker.rank.executor import Executor
from tensorway_worker.rank.waited_step import run_in

_COPIED_BYTES = 512 << 20


class _Stream:
    """Listens to one answer."""

    def __init__(self) -> None:
        self.came: list[tuple[float, int]] = []
        self.over = asyncio.Event()

    def advanced(self, advance: Advance) -> None:
        self.came.append((time.perf_counter(), len(advance.token_ids)))

    def finished(self, finish: Finish) -> None:
        self.over.set()

    def failed(self, error: TensorwayError) -> None:
        raise error


async def engine_rates(directory: ModelDirectory, threads: int, concurrencies: list[int]) -> dict[int, dict[str, float]]:
    yaml = directory.yaml.generation
    executor = Executor(asyncio.get_running_loop(), threads, _crashed)
    executor.start()
    engine = GenerationEngine(directory, "cpu")
    await executor.run(engine.load)
    assert yaml is not None
    assert engine.text is not None
    dimensions = engine.dimensions
    scheduler = Scheduler(BlockPool(dimensions.num_blocks, dimensions.block_tokens), Limits(yaml.max_sequences, yaml.step_tokens))
    generator = Generator(scheduler, engine.text, dimensions.max_context, lambda carry: run_in(executor, engine.run, carry), _raised)
    generator.start()
    found = {}
    await _all_streams(generator, 4, Times(), 99)
    for concurrency in concurrencies:
        times = Times()
        began_s = time.perf_counter()
        await _all_streams(generator, concurrency, times, concurrency)
        times.took_s = time.perf_counter() - began_s
        found[concurrency] = times.summary()
    generator.close()
    executor.stop()
    return found


async def _all_streams(generator: Generator, concurrency: int, times: Times, seed: int) -> None:
    async def stream(own: list[list[int]]) -> None:
        for prompt in own:
            listener = _Stream()
            began_s = time.perf_counter()
            stop = StopRules(NEW_TOKENS)
            generator.submit(GenerationRequest("", tuple(prompt), (), Sampling(), stop, 0, time.monotonic() + 600), listener)
            await listener.over.wait()
            times.add(began_s, listener.came)

    rounds = ROUNDS[concurrency]
    asked = prompts(concurrency * rounds, seed)
    await asyncio.gather(*(stream(asked[number::concurrency]) for number in range(concurrency)))


def generate_rates(directory: ModelDirectory, concurrencies: list[int]) -> dict[int, dict[str, float]]:
    model = Pretrained(directory, TASKS["generation"]).whole("cpu").eval()
    found = {}
    for concurrency in concurrencies:
        rounds = ROUNDS[concurrency]
        asked = prompts(concurrency * rounds, concurrency)
        _generate(model, asked[:1], 4)
        began_s = time.perf_counter()
        for number in range(rounds):
            _generate(model, asked[number * concurrency : (number + 1) * concurrency], NEW_TOKENS)
        found[concurrency] = {"tokens_per_s": concurrency * rounds * NEW_TOKENS / (time.perf_counter() - began_s)}
    return found


def _generate(model: Any, asked: list[list[int]], num_tokens: int) -> None:
    longest = max(map(len, asked))
    ids = torch.tensor([[2] * (longest - len(prompt)) + prompt for prompt in asked])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked])
    with torch.inference_mode():
        model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=2)


def continuous_rates(directory: ModelDirectory, concurrencies: list[int]) -> dict[int, dict[str, float]]:
    model = Pretrained(directory, TASKS["generation"]).whole("cpu").eval()
    found = {}
    config = transformers.GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=2)
    for concurrency in concurrencies:
        asked = prompts(concurrency * ROUNDS[concurrency], concurrency)
        began_s = time.perf_counter()
        for number in range(ROUNDS[concurrency]):
            some = asked[number * concurrency : (number + 1) * concurrency]
            outcome = model.generate_batch(inputs=some, generation_config=config, progress_bar=False)
            assert sum(len(one.generated_tokens) for one in outcome.values()) == len(some) * NEW_TOKENS
        found[concurrency] = {"tokens_per_s": len(asked) * NEW_TOKENS / (time.perf_counter() - began_s)}
    return found


def bandwidth(directory: ModelDirectory) -> dict[str, float]:
    """Bytes per second that a copy reads, and the bytes of all weights that a step reads."""
    model = Pretrained(directory, TASKS["generation"]).whole("cpu")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    source, target = torch.ones(_COPIED_BYTES, dtype=torch.uint8), torch.empty(_COPIED_BYTES, dtype=torch.uint8)
    best_s = float("inf")
    for _ in range(8):
        began_s = time.perf_counter()
        target.copy_(source)
        best_s = min(best_s, time.perf_counter() - began_s)
    return {"copy_bytes_per_s": _COPIED_BYTES / best_s, "weights_bytes": float(weights)}


def _crashed(error: BaseException) -> None:
    raise error


def _raised(error: Exception) -> TensorwayError:
    raise error


def main() -> None:
    kind, path, threads, *rest = sys.argv[1:]
    torch.set_num_threads(int(threads))
    directory, concurrencies = load_directory(Path(path)), [int(one) for one in rest]
    if kind == "engine":
        print(json.dumps(asyncio.run(engine_rates(directory, int(threads), concurrencies))))
    elif kind == "bandwidth":
        print(json.dumps(bandwidth(directory)))
    else:
        print(json.dumps({"generate": generate_rates, "continuous": continuous_rates}[kind](directory, concurrencies)))


if __name__ == "__main__":
    main()

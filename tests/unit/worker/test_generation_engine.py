"""The generation engine beside transformers' own `generate`: the same tokens, whatever shares a step with whom."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from generating import GPT2, SIZES, VOCABULARY, answers, made, prompts, reference
from shard_threads import ThreadCollective

from tensorway.errors import FailedPrecondition
from tensorway.model import Inputs, Outputs
from tensorway_worker.engines import open_engine
from tensorway_worker.engines.generation.engine import GenerationEngine
from tensorway_worker.engines.generation.layout import carried
from tensorway_worker.engines.generation.requests import Sampling
from tensorway_worker.engines.generation.sampler import SamplingRows
from tensorway_worker.engines.generation.scheduler import Limits, Row, Sequence
from tensorway_worker.engines.port import Cut
from tensorway_worker.topology import Topology

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": SIZES,
    "MistralForCausalLM": {**SIZES, "sliding_window": 7},
    "Qwen2ForCausalLM": SIZES,
    "Qwen3ForCausalLM": {**SIZES, "head_dim": 12},
    "GPT2LMHeadModel": GPT2,
}


def opened(folder: Path, *args: Any, **more: Any) -> GenerationEngine:
    engine = open_engine(made(folder, *args, **more), "cpu")
    assert isinstance(engine, GenerationEngine)
    engine.load()
    return engine


def whole(architecture: str, config: dict[str, Any]) -> Any:
    """The model as transformers alone makes it."""
    kind = getattr(transformers, architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return kind(kind.config_class(**config)).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_are_those_of_generate(tmp_path: Path, architecture: str) -> None:
    config = ARCHITECTURES[architecture]
    engine, model = opened(tmp_path, architecture, config), whole(architecture, config)
    asked = prompts(9, 40)
    wanted = [reference(model, prompt, 12) for prompt in asked]
    assert len({tuple(one) for one in wanted}) > 1
    for prefill_tokens, arrivals in ((None, 9), (3, 2), (1, 1)):
        assert answers(engine, asked, 12, prefill_tokens=prefill_tokens, arrivals=arrivals) == wanted


def test_answers_that_share_a_prefix_or_give_way_are_the_same(tmp_path: Path) -> None:
    engine, model = opened(tmp_path), whole("LlamaForCausalLM", SIZES)
    asked = prompts(12, 9, shared=30)
    wanted = [reference(model, prompt, 20) for prompt in asked]
    # 12 answers of up to 58 tokens in room for 100: most of them give way, some several times.
    assert answers(engine, asked, 20, num_blocks=25, limits=Limits(8, 16)) == wanted
    assert answers(engine, asked, 20) == wanted


def test_penalties_are_those_of_generate(tmp_path: Path) -> None:
    engine, model = opened(tmp_path), whole("LlamaForCausalLM", SIZES)
    asked = prompts(4, 20)
    wanted = [reference(model, prompt, 15, repetition_penalty=1.7) for prompt in asked]
    assert wanted != [reference(model, prompt, 15) for prompt in asked]
    assert answers(engine, asked, 15, sampling=[Sampling(repetition_penalty=1.7)] * 4) == wanted


def test_drawn_answers_do_not_depend_on_their_neighbours(tmp_path: Path) -> None:
    engine = opened(tmp_path)
    asked = prompts(8, 20)
    ways = [Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=number) for number in range(8)]
    together = answers(engine, asked, 15, sampling=ways)
    assert together == [answers(engine, [prompt], 15, sampling=[way])[0] for prompt, way in zip(asked, ways, strict=True)]
    assert together != answers(engine, asked, 15)
    # One that goes on elsewhere after seven tokens.
    resumed = [[*prompt, *begun[:7]] for prompt, begun in zip(asked, together, strict=True)]
    assert answers(engine, resumed, 8, sampling=ways) == [one[7:] for one in together]


def all_at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """Each in a thread of its own."""

    def in_inference_mode(call: Callable[[], Any]) -> Any:
        with torch.inference_mode():
            return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return [one.result() for one in [threads.submit(in_inference_mode, call) for call in calls]]


def cut(folder: Path, num_stages: int, *args: Any) -> list[GenerationEngine]:
    directory = made(folder, *args)
    said: dict[str, str] = {}

    def agree(key: str, decide: Any) -> str:
        return said.setdefault(key, "") or said.__setitem__(key, decide()) or said[key]

    places = [Topology(num_stages, 1).place(rank) for rank in range(num_stages)]
    parts = [GenerationEngine(directory, "cpu", Cut(place, None, agree)) for place in places]  # type: ignore[arg-type]
    for part in parts:
        part.load()
    return parts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_stages", [2, 3])
def test_a_pipeline_draws_what_the_whole_model_draws(tmp_path: Path, architecture: str, num_stages: int) -> None:
    config = ARCHITECTURES[architecture]
    engine = opened(tmp_path / "whole", architecture, config)
    parts = cut(tmp_path / "cut", num_stages, architecture, config)

    def run(carry: Inputs) -> Outputs:
        for part in parts:
            carry = part.run(carry)
        return carry

    asked = prompts(6, 30)
    ways = [Sampling(temperature=0.8 * (number % 2), seed=number) for number in range(6)]
    assert answers(parts[0], asked, 10, run=run, sampling=ways) == answers(engine, asked, 10, sampling=ways)
    held = [set(part._cache._layers) for part in parts if part._cache is not None]
    assert set().union(*held) == set(range(4))
    assert sum(map(len, held)) == 4, "each stage keeps the keys and values of its own layers only"


def test_tensor_shards_draw_what_the_whole_model_draws(tmp_path: Path) -> None:
    engine = opened(tmp_path / "whole")
    directory = made(tmp_path / "cut")
    barrier, slots = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2
    collectives = [ThreadCollective(shard, slots, barrier) for shard in range(2)]
    topology = Topology(1, 2)
    shards = [
        GenerationEngine(directory, "cpu", Cut(topology.place(rank), collective, lambda _, decide: decide()))
        for rank, collective in enumerate(collectives)
    ]
    for shard in shards:
        shard.load()

    def run(carry: Inputs) -> Outputs:
        first, second = all_at_once([lambda shard=shard: shard.run(dict(carry)) for shard in shards])
        assert torch.equal(first["token"], second["token"])
        return first

    asked = prompts(5, 30)
    assert answers(shards[0], asked, 10, run=run) == answers(engine, asked, 10)
    assert shards[0].cache_bytes == engine.cache_bytes // 2, "each shard keeps the keys and values of its own heads only"


def test_logprobs_are_those_of_the_models_own_distribution(tmp_path: Path) -> None:
    engine, model = opened(tmp_path), whole("LlamaForCausalLM", SIZES)
    prompt = prompts(1, 20)[0]
    row = Row(Sequence(0, prompt, blocks=list(range(10))), 0, len(prompt))
    draws = SamplingRows.of([(Sampling(temperature=0.5, top_k=3), len(prompt), (), (), 4)])
    with torch.inference_mode():
        drawn = engine.run({**carried([row]), **draws.to_tensors()})
        wanted = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert drawn["top_ids"].tolist() == [wanted.topk(4).indices.tolist()]
    torch.testing.assert_close(drawn["top_logprobs"][0], wanted.topk(4).values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drawn["logprob"][0], wanted[drawn["token"][0]], atol=1e-4, rtol=1e-4)


def test_half_the_bits_answer_too(tmp_path: Path) -> None:
    engine = opened(tmp_path, weights_dtype="bfloat16")
    assert engine.dimensions.num_blocks == 2 * opened(tmp_path / "full").dimensions.num_blocks
    found = answers(engine, prompts(5, 30), 10)
    assert all(len(one) == 10 and max(one) < VOCABULARY for one in found)


@pytest.mark.parametrize(
    ("architecture", "config", "why"),
    [
        ("MambaForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}, "keep no keys and values"),
        ("Gemma2ForCausalLM", {**SIZES, "head_dim": 8, "attn_logit_softcapping": 30.0}, "softcap"),
    ],
)
def test_models_whose_attention_is_another_are_refused(tmp_path: Path, architecture: str, config: dict[str, Any], why: str) -> None:
    def run() -> None:
        engine = opened(tmp_path, architecture, config)
        engine.run(engine.example(1) or {})

    with pytest.raises(FailedPrecondition, match=why):
        run()


def test_room_for_no_block_is_said(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"generation\.kv_cache_mb: 1 MiB hold no block of 1024 tokens, which takes \d+ MiB"):
        opened(tmp_path, config={**SIZES, "num_hidden_layers": 40}, generation={"block_tokens": 1024})

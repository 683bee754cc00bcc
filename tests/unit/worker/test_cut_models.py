"""The ready models, cut: each part loads its own weights alone, and a chain of the parts answers what the whole answers, bit for bit."""

from __future__ import annotations

import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import pytest
import torch
from cut_ranks import Agreement, chained, stages_of, whole_of
from shard_threads import ThreadCollective
from worker_wire import MODELS

from tensorway.model import Inputs
from tensorway.model_directory import load_directory
from tensorway_worker.engines import open_engine
from tensorway_worker.engines.port import Cut, Engine
from tensorway_worker.engines.reference import compare
from tensorway_worker.topology import Place
from tests.unit.worker.smollm2 import whole_engine

pytestmark = pytest.mark.models


@cache
def whole(name: str) -> Engine:
    return whole_engine() if name == "smollm2" else whole_of(MODELS / name)


def check(name: str, engines: list[Engine], *batches: Inputs) -> None:
    for inputs in batches:
        with torch.inference_mode():
            wanted = whole(name).run(dict(inputs))
        found = chained([engine.run for engine in engines], inputs)
        assert found.keys() == wanted.keys()
        for output, value in wanted.items():
            assert torch.equal(found[output], value), output


def example(name: str, rows: int) -> Inputs:
    found = whole(name).example(rows)
    assert found is not None
    return found


def texts(rows: int, length: int, vocabulary: int) -> Inputs:
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[rows // 2, length // 2 + 1 :] = 0
    generator = torch.Generator().manual_seed(rows)
    return {"input_ids": torch.randint(0, vocabulary, (rows, length), generator=generator), "attention_mask": mask}


@pytest.mark.parametrize("num_stages", [2, 3])
def test_minilm(num_stages: int) -> None:
    agreement = Agreement()
    engines = stages_of(MODELS / "minilm-ids", num_stages, agreement)
    check("minilm-ids", engines, example("minilm-ids", 3), texts(1, 1, 30522), texts(8, 33, 30522), texts(2, 128, 30522))
    # What all ranks hold together is the model once.
    assert sum(engine.memory_bytes() for engine in engines) - whole("minilm-ids").memory_bytes() <= num_stages * 8192
    said = json.loads(agreement.said["cut"])
    assert said["units"] == ["embeddings", *(f"encoder.layer.{layer}" for layer in range(6)), "pooler"]
    runs = [said["units"][begin:end] for begin, end in pairwise(said["boundaries"])]
    assert [sum("layer" in unit for unit in run) for run in runs] == [6 // num_stages] * num_stages


def test_minilm_of_text_pads_and_tokenises_in_every_rank_alike() -> None:
    engines = stages_of(MODELS / "minilm", 2)
    rows = engines[0].preprocess({"text": [b"A cat sits on the mat.", b"hello"]}, {})  # type: ignore[dict-item]
    assert torch.equal(rows["input_ids"], whole("minilm").preprocess({"text": [b"A cat sits on the mat.", b"hello"]}, {})["input_ids"])  # type: ignore[dict-item]
    assert engines[0].padding == whole("minilm").padding
    check("minilm", engines, rows)
    tokens = engines[0].tokens("input_ids", rows["input_ids"])
    assert tokens is not None
    assert [*tokens[0][:4]] == [b"[CLS]", b"a", b"cat", b"sits"]


def test_resnet50_from_a_seed_is_the_same_network_in_parts() -> None:
    engines = stages_of(MODELS / "resnet50", 2)
    check("resnet50", engines, example("resnet50", 2), example("resnet50", 1))
    whole_bytes = whole("resnet50").memory_bytes()
    assert sum(engine.memory_bytes() for engine in engines) == whole_bytes
    assert all(0 < engine.memory_bytes() < whole_bytes for engine in engines)


def test_smollm2() -> None:
    agreement = Agreement()
    engines = stages_of(MODELS / "smollm2", 2, agreement)
    check("smollm2", engines, texts(3, 11, 49152), texts(1, 5, 49152))
    said = json.loads(agreement.said["cut"])
    # The head is worth layers, so the last rank has fewer of them; its table is tied to the embedding's, and both ranks need it.
    assert said["boundaries"][1] <= 15
    table = 49152 * 576 * 4
    assert all(table < engine.memory_bytes() < whole("smollm2").memory_bytes() - table for engine in engines)


@pytest.mark.parametrize("name", ["minilm-ids", "smollm2"])
def test_stages_of_shards_are_the_uncut_model_within_the_tolerance(name: str) -> None:
    """Pipeline 2 x tensor 2: each stage's shards run at once, in a thread each, and really sum what they make."""
    agreement = Agreement()
    barriers = [threading.Barrier(2, timeout=60) for _ in range(2)]
    slots = [[torch.empty(0)] * 2 for _ in range(2)]
    ranks: dict[tuple[int, int], Engine] = {}
    for stage, shard in itertools.product(range(2), range(2)):
        cut = Cut(Place(stage, 2, shard, 2), ThreadCollective(shard, slots[stage], barriers[stage]), agreement)
        ranks[stage, shard] = open_engine(load_directory(MODELS / name), "cpu", cut)
        ranks[stage, shard].load()
    assert all(engine.memory_bytes() < whole(name).memory_bytes() * 0.8 for engine in ranks.values())
    inputs = example(name, 3)
    carries = [dict(inputs), dict(inputs)]
    with ThreadPoolExecutor(2) as pool:
        for stage in range(2):
            carries = list(pool.map(lambda rank, carry: rank.run(carry), [ranks[stage, 0], ranks[stage, 1]], carries))
    with torch.inference_mode():
        wanted = whole(name).run(dict(inputs))
    for found in carries:
        assert compare(found, wanted, 2) is None
        # Another order of sums: a shard that did all the work alone would give the same bits.
        assert compare(found, wanted, 1) is not None


@pytest.mark.parametrize("name", ["minilm-ids", "smollm2"])
def test_weights_of_a_mapped_file_lie_where_the_parts_do(name: str) -> None:
    model = whole(name)._model  # type: ignore[attr-defined]
    assert {one.data_ptr() % 64 for one in model.parameters()} == {0}


@pytest.mark.parametrize(("name", "width"), [("minilm-ids", 384), ("smollm2", 576)])
def test_embeddings(name: str, width: int) -> None:
    found = whole(name).embedding("input_ids")
    assert isinstance(found, torch.nn.Embedding)
    assert found.embedding_dim == width
    assert whole(name).embedding("attention_mask") is None
    assert whole("resnet50").embedding("pixel_values") is None


def test_derivatives_at_the_embedding_pass_through_both_parts() -> None:
    engines = stages_of(MODELS / "minilm-ids", 2)
    inputs = example("minilm-ids", 2)
    wanted = gradient_at_embedding([whole("minilm-ids")], inputs)
    assert wanted.abs().max() > 0
    assert torch.allclose(gradient_at_embedding(engines, inputs), wanted, rtol=1e-4, atol=1e-6)


def gradient_at_embedding(engines: list[Engine], inputs: Inputs) -> torch.Tensor:
    """d embedding[:, 0].sum() / d output of the token embedding, through live graphs."""
    embedding = engines[0].embedding("input_ids")
    assert embedding is not None
    leaves: list[torch.Tensor] = []

    def replace(_: torch.nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    hook = embedding.register_forward_hook(replace)
    carry = dict(inputs)
    for engine in engines:
        carry = engine.run(carry)
    hook.remove()
    (found,) = torch.autograd.grad(carry["embedding"][:, 0].sum(), leaves)
    return found

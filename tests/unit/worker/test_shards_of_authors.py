"""Tensor plans that an author writes, and what stays whole because it cannot be cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from shard_checks import same_as_whole
from shard_threads import Shards, from_whole
from torch import nn

from tensorway.errors import FailedPrecondition
from tensorway_worker.engines.cut.shards import Sharding, refuse_unsharded, shard_module
from tensorway_worker.engines.cut.tensor_plan import plan_of, resolve, summary
from tensorway_worker.topology import Place


class Block(nn.Module):
    """An author's own layer."""

    def __init__(self, width: int = 8, hidden: int = 12, heads: int = 4) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.up = nn.Linear(width, hidden)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.down(torch.relu(self.up(x)) * self.gate(x))


class Attention(nn.Module):
    """Without a mask; heads as wide as their number says."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Own(nn.Module):
    """An author's own model: ids to scores."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 6)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return (self.head(x),)


_OWN_PLAN = {
    "words": "embedding_colwise",
    "layers.*.attention.*": "colwise",
    "layers.*.attention.out": "rowwise",
    "layers.*.up": "colwise",
    "layers.*.gate": "colwise",
    "layers.*.down": "rowwise",
    "head": "colwise_rep",
}


def own() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Own().eval().requires_grad_(False)


@pytest.mark.parametrize("swapped", ["", "words"])
def test_an_author_writes_a_plan(swapped: str) -> None:
    plan = dict(sorted(_OWN_PLAN.items(), key=lambda pair: "*" in pair[0].rpartition(".")[2]))
    if swapped:
        plan[swapped] = "embedding_rowwise"
    shards = Shards(2, from_whole(Own, own(), plan))
    assert shards.shardings[0].kept_whole == []
    assert len(shards.shardings[0].slices) == 1 + 2 * (3 * 2 + 1 + 2 + 1 + 1) + 2
    same_as_whole(shards, own(), {"ids": torch.tensor([[1, 2, 9], [0, 4, 4]])})


@pytest.mark.parametrize(
    ("changes", "num_shards", "said"),
    [
        ({"layers.*.up": "sideways"}, 2, "layers.*.gate: the plan's word 'sideways' is not known to Tensorway"),
        ({"layers.*.gate": "replicate"}, 2, "layers.*.up: the plan keeps layers.0.gate whole, and what it makes may meet what is cut"),
        ({}, 3, "layers.*.attention: 4 heads do not divide by 3"),
        ({"layers.*.attention.k.weight": "colwise"}, 2, "the plan cuts the parameter weight (colwise), and only whole layers can be cut"),
        ({"words": "colwise"}, 2, "words is a Embedding; only Linear layers can be cut like this"),
        ({"head": "colwise"}, 2, "head: colwise layers must be followed by a rowwise one in the same layer of the model"),
        ({"head": "colwise_gather_output"}, 4, "head: its width of 6 does not divide by 4"),
    ],
)
def test_what_cannot_be_cut_is_whole_with_the_reason(changes: Mapping[str, str], num_shards: int, said: str) -> None:
    plan = plan_of(own(), {**changes, **{key: word for key, word in _OWN_PLAN.items() if key not in changes and "attention.*" not in key},
                           **dict.fromkeys((f"layers.*.attention.{one}" for one in "qkv"), "colwise")})  # fmt: skip
    shards = Shards(num_shards, from_whole(Own, own(), plan))
    assert any(said in line for line in summary(shards.shardings[0].kept_whole)), summary(shards.shardings[0].kept_whole)
    same_as_whole(shards, own(), {"ids": torch.tensor([[1, 2, 9], [0, 4, 4]])})


def test_a_fused_layer_is_not_torn() -> None:
    model = nn.Module()
    model.attention = nn.Module()
    model.attention.qkv, model.attention.out = nn.Linear(8, 24), nn.Linear(8, 8)
    model.attention.head_dim = 2
    decisions = resolve(model, {"attention.qkv": "colwise", "attention.out": "rowwise"}, 2)
    assert not decisions.cut
    assert [one.reason for one in decisions.kept_whole] == [
        "its colwise layers make 24 numbers, its rowwise layer takes 8: a fused layer cannot be cut"
    ]


def test_attention_that_says_nothing_of_heads_is_whole() -> None:
    model = nn.Module()
    model.attention = nn.Module()
    model.attention.q, model.attention.o = nn.Linear(8, 8), nn.Linear(8, 8)
    decisions = resolve(model, {"attention.q": "colwise", "attention.o": "rowwise"}, 2)
    assert not decisions.cut
    assert "says nowhere how many heads it has" in decisions.kept_whole[0].reason


def test_one_shard_touches_nothing() -> None:
    model = Own()
    before = list(model.modules())
    assert shard_module(model, _OWN_PLAN, Place(), None) == Sharding()  # type: ignore[arg-type]
    assert list(model.modules()) == before


def test_a_model_of_which_nothing_can_be_cut_is_refused() -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    model = transformers.ResNetForImageClassification(config)
    place = Place(num_shards=2)
    sharding = shard_module(model, plan_of(model), place, None)  # type: ignore[arg-type]
    said = r"^resnet50: nothing of it can be cut into 2 tensor shards \(ResNetForImageClassification has no tensor plan"
    with pytest.raises(FailedPrecondition, match=said):
        refuse_unsharded(sharding, place, "resnet50")
    refuse_unsharded(sharding, Place(), "resnet50")


@pytest.mark.parametrize("wanted", [["layers.*"], {"layers.*": 2}, "colwise"])
def test_a_plan_must_be_a_mapping_of_texts(wanted: Any) -> None:
    with pytest.raises(FailedPrecondition, match="must map patterns of module names to words"):
        plan_of(Own(), wanted)

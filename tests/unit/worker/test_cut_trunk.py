"""Where a model can be cut is found by running it, and where not, the reason is given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from cut_ranks import Agreement, Alone, CutModule, chained, uncut

from tensorway.errors import FailedPrecondition
from tensorway.model import Inputs, Outputs
from tensorway_worker.engines.cut.assembly import assembled
from tensorway_worker.engines.cut.empty import without_memory
from tensorway_worker.engines.cut.tracer import trace
from tensorway_worker.engines.cut.trunk import why_not
from tensorway_worker.engines.port import Cut
from tensorway_worker.topology import Place


def linear() -> torch.nn.Linear:
    return torch.nn.Linear(8, 8)


class UNet(torch.nn.Module):
    """Every way down has a skip to its way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom, self.up2, self.up1 = (linear() for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down1(x)
        second = self.down2(first)
        return self.up1(self.up2(self.bottom(second) + second) + first)


class Pairs(torch.nn.Module):
    """Two activations all the way."""

    def __init__(self) -> None:
        super().__init__()
        self.left = torch.nn.ModuleList(linear() for _ in range(3))
        self.right = torch.nn.ModuleList(linear() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x, x
        for one, other in zip(self.left, self.right, strict=True):
            left, right = one(left + right), other(left)
        return left + right


class Gated(torch.nn.Module):
    """Looks at what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(), linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        return self.second(hidden) if hidden.sum() > 0 else hidden


class Loose(torch.nn.Module):
    """Works with a parameter-like tensor that no module owns."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        self.table = [torch.nn.Linear(8, 8).weight.detach().to("meta")]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) @ self.table[0]


class Written(torch.nn.Module):
    """Collects what each layer makes in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(linear() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros(3, *x.shape)
        for place, layer in enumerate(self.layers):
            x = layer(x)
            kept[place] = x
        return kept.sum(0)


def cut(kind: Callable[[], torch.nn.Module]) -> CutModule:
    return CutModule(kind, lambda module, inputs: {"y": module(inputs["x"])}, {"x": torch.randn(3, 8)})


def test_nested_sequentials_are_flattened() -> None:
    nest = cut(lambda: torch.nn.Sequential(torch.nn.Sequential(linear(), torch.nn.Sequential(linear(), torch.nn.ReLU())), linear()))
    assert [unit.name for unit in nest.trunk.units] == ["0.0", "0.1.0", "0.1.1", "1"]


def test_a_skip_is_found_and_named() -> None:
    net = cut(UNet)
    assert [unit.name for unit in net.trunk.units] == ["down1", "down2 … up1"]
    reasons = {refusal.module: refusal.reason for refusal in net.trunk.refusals}
    assert reasons["down2"] == "what down1 made is still needed after it"
    assert reasons["bottom"] == "what down1, down2 made is still needed after it"
    assert "it is one chain of 2 parts only, 3 are wanted: not after down2" in why_not(net.trunk, 3)


@pytest.mark.parametrize("kind", [Pairs, Written, UNet])
def test_what_is_no_chain_stays_in_one_piece_after_its_first_layer(kind: Callable[[], torch.nn.Module]) -> None:
    # After the first layer there is one activation, and the input itself travels on: that cut is right, and served right.
    net = cut(kind)
    assert len(net.trunk.units) == 2
    inputs: Inputs = {"x": torch.randn(5, 8)}
    assert torch.equal(chained(net.stages((0, 1, 2)), inputs)["y"], net.whole(inputs)["y"])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Gated, "the model's forward decides by the values of activations"),
        (Loose, r"shape \[8, 8\] that belongs to none of the model's modules"),
    ],
)
def test_what_cannot_be_followed_is_said(kind: Callable[[], torch.nn.Module], words: str) -> None:
    with without_memory():
        module = kind().eval()
    with pytest.raises(FailedPrecondition, match=words):
        trace(module, lambda inputs: {"y": module(inputs["x"])}, {"x": torch.randn(3, 8)})


def test_a_group_refuses_what_cannot_be_cut() -> None:
    with without_memory():
        net = UNet().eval()

    def call(inputs: Inputs) -> Outputs:
        return {"y": net(inputs["x"])}

    def never() -> object:
        raise AssertionError("no weights are read for a model that cannot be cut")

    with pytest.raises(FailedPrecondition, match=r"unet cannot be cut into 3 pipeline stages: .*what down1 made is still needed"):
        assembled(uncut("unet", net, call, {"x": torch.randn(3, 8)}), Cut(Place(0, 3), Alone(), Agreement()), never)  # type: ignore[arg-type]


def names(model: CutModule) -> list[str]:
    return [unit.name for unit in model.trunk.units]


def ids(rows: int, length: int) -> Inputs:
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    return {"input_ids": torch.randint(0, 100, (rows, length)), "attention_mask": mask}


def test_a_transformer_is_cut_between_its_layers() -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=3, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=100,
        tie_word_embeddings=True,
    )
    llama = CutModule(
        lambda: transformers.AutoModelForCausalLM.from_config(config),
        lambda module, inputs: {"y": module(**inputs, use_cache=False).logits}, ids(3, 11),
    )
    assert names(llama) == ["model.embed_tokens … model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head"]
    assert llama.trunk.trace.embeddings == {"input_ids": "model.embed_tokens"}


def test_a_resnet_is_cut_between_its_blocks_and_its_work_is_counted() -> None:
    config = transformers.ResNetConfig(depths=[2, 2], hidden_sizes=[32, 64], embedding_size=16, layer_type="basic")
    resnet = CutModule(
        lambda: transformers.ResNetForImageClassification(config), lambda module, inputs: {"y": module(**inputs).logits},
        {"pixel_values": torch.randn(2, 3, 64, 64)},
    )
    blocks = [name for name in names(resnet) if "layers" in name]
    assert blocks == [f"resnet.encoder.stages.{stage}.layers.{layer}" for stage, layer in ((0, 0), (0, 1), (1, 0), (1, 1))]
    # The first convolution: 2 pictures x 16 channels x 32 x 32 places x (3 x 7 x 7) products, two operations each.
    first = resnet.trunk.units[0]
    counted = sum(one.flops for one in resnet.trunk.trace.operations[first.begin : first.end])
    assert counted == 2 * (2 * 16 * 32 * 32 * 3 * 7 * 7)

"""A cut module computes what the whole one does, bit for bit, and passes derivatives back; whatever no stage should look at is NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from cut_ranks import CutModule, chained

from tensorway.errors import ModelFailed
from tensorway.model import Inputs
from tensorway_worker.engines.cut.stage import ACTIVATION, INPUT_SHAPE

Build = Callable[[], torch.nn.Module]


def texts(rows: int, length: int) -> Inputs:
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, (length + 1) // 2 :] = 0
    generator = torch.Generator().manual_seed(rows * length)
    return {"input_ids": torch.randint(0, 100, (rows, length), generator=generator), "attention_mask": mask}


def pictures(rows: int, extent: int) -> Inputs:
    return {"pixel_values": torch.randn(rows, 3, extent, extent, generator=torch.Generator().manual_seed(rows))}


def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=3, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=100,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> torch.nn.Module:
    # Token and position embeddings are added outside of any module; positions are of another shape.
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_head=4, n_embd=96, vocab_size=100, bos_token_id=1, eos_token_id=2)
    )


def albert() -> torch.nn.Module:
    # One layer, called five times.
    config = transformers.AlbertConfig(
        vocab_size=100, hidden_size=64, embedding_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=5
    )
    return transformers.AlbertModel(config)


def bert() -> torch.nn.Module:
    config = transformers.BertConfig(vocab_size=100, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_hidden_layers=3)
    return transformers.BertModel(config)


def resnet() -> torch.nn.Module:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(depths=[2, 2], hidden_sizes=[32, 64], embedding_size=16, layer_type="basic")
    )


def vit() -> torch.nn.Module:
    # Its class token and positions are parameters of the embeddings module itself.
    config = transformers.ViTConfig(num_hidden_layers=2, image_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=4)
    return transformers.ViTForImageClassification(config)


class Glued(torch.nn.Module):
    """Functions between its modules, a shared activation that works in place, a parameter of its own, a second input that is needed late,
    and a first one that it writes into."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3)
        self.second = torch.nn.Conv2d(8, 5, 3, 2)
        self.offset = torch.nn.Parameter(torch.randn(5, 1, 1))
        self.third, self.last = torch.nn.Linear(5, 7), torch.nn.Linear(7, 2)
        self.rectify = torch.nn.ReLU(inplace=True)

    def forward(self, pixel_values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.max_pool2d(self.rectify(self.first(pixel_values.mul_(2))), 2)
        hidden = (self.rectify(self.second(hidden)) + self.offset).mean((2, 3))
        rows, _ = hidden.shape
        return self.last(self.rectify(self.third(hidden)) * scale[:rows])


class Tupled(torch.nn.Module):
    """Layers that hand a mask on beside the activation."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.linear(hidden) * mask + hidden, mask

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(self.Layer() for _ in range(4))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden, mask = layer(hidden, mask)
        return hidden


def of_texts(output: str) -> Callable[[torch.nn.Module, Inputs], Inputs]:
    return lambda module, inputs: {"y": getattr(module(**inputs), output)}


def glued_inputs(rows: int, extent: int) -> Inputs:
    return {**pictures(rows, extent), "scale": torch.rand(rows, 1, generator=torch.Generator().manual_seed(rows))}


def tupled_inputs(rows: int, _: int) -> Inputs:
    hidden = torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))
    return {"hidden": hidden, "mask": torch.arange(rows * 8).reshape(rows, 8) % 2}


def logits(module: torch.nn.Module, inputs: Inputs) -> Inputs:
    return {"y": module(**inputs).logits}


def itself(module: torch.nn.Module, inputs: Inputs) -> Inputs:
    return {"y": module(**inputs)}


MODULES: dict[str, tuple[Build, Callable[[torch.nn.Module, Inputs], Inputs], Callable[[int, int], Inputs], list[tuple[int, int]]]] = {
    "bert": (bert, of_texts("last_hidden_state"), texts, [(3, 11), (1, 1), (8, 33), (2, 11)]),
    "llama": (llama, logits, texts, [(3, 11), (1, 1), (8, 33), (2, 11)]),
    "gpt2": (gpt2, logits, texts, [(3, 11), (1, 5), (8, 33)]),
    "albert": (albert, of_texts("last_hidden_state"), texts, [(3, 11), (1, 5), (8, 33)]),
    "resnet": (resnet, logits, pictures, [(2, 64), (1, 64), (3, 96)]),
    "vit": (vit, logits, pictures, [(2, 64), (1, 64)]),
    "glued": (Glued, itself, glued_inputs, [(3, 16), (1, 20), (2, 33)]),
    "tupled": (Tupled, itself, tupled_inputs, [(3, 0), (1, 0), (4, 0)]),
}


@pytest.mark.parametrize("name", MODULES)
def test_stages_compute_what_the_whole_computes(name: str) -> None:
    build, call, make, sizes = MODULES[name]
    module = CutModule(build, call, make(*sizes[0]))
    for num_stages in range(2, min(4, len(module.trunk.units)) + 1):
        stages = module.stages(module.boundaries(num_stages))
        # Sizes change from batch to batch, back and forth.
        for rows, extent in (*sizes, sizes[0]):
            inputs = make(rows, extent)
            wanted = module.whole({key: value.clone() for key, value in inputs.items()})["y"]
            assert torch.isfinite(wanted).all()
            assert torch.equal(chained(stages, inputs)["y"], wanted), (num_stages, rows, extent)


@pytest.mark.parametrize("name", MODULES)
def test_every_single_cut_is_right(name: str) -> None:
    build, call, make, sizes = MODULES[name]
    module = CutModule(build, call, make(*sizes[0]))
    wanted = module.whole(make(*sizes[1]))["y"]
    for boundary in range(1, len(module.trunk.units)):
        stages = module.stages((0, boundary, len(module.trunk.units)))
        assert torch.equal(chained(stages, make(*sizes[1]))["y"], wanted), module.trunk.units[boundary].name


def gradients(stages: list[Callable[[Inputs], Inputs]], inputs: Inputs, name: str) -> torch.Tensor:
    """d sum(y * y) / d inputs[name], back through the carries one stage at a time, as ranks do it."""
    tapes: list[tuple[Inputs, Inputs]] = []
    carry = dict(inputs)
    for stage in stages:
        leaves = {key: value.detach().requires_grad_() for key, value in carry.items() if value.is_floating_point()}
        outputs = stage({**carry, **leaves})
        tapes.append((leaves, outputs))
        carry = {key: value.detach() for key, value in outputs.items()}
    back = {"y": 2 * carry["y"]}
    for leaves, outputs in reversed(tapes):
        pairs = [(value, back[key]) for key, value in outputs.items() if value.requires_grad and key in back]
        found = torch.autograd.grad([one for one, _ in pairs], list(leaves.values()), [one for _, one in pairs], allow_unused=True)
        back = {key: torch.zeros_like(leaf) if one is None else one for (key, leaf), one in zip(leaves.items(), found, strict=True)}
    return back[name]


@pytest.mark.parametrize(("name", "of"), [("resnet", "pixel_values"), ("vit", "pixel_values"), ("tupled", "hidden"), ("glued", "scale")])
def test_derivatives_from_carry_to_carry_are_those_of_the_whole(name: str, of: str) -> None:
    build, call, make, sizes = MODULES[name]
    module = CutModule(build, call, make(*sizes[0]))
    inputs = make(*sizes[0])
    leaf = inputs[of].clone().requires_grad_()
    outputs = call(module._whole, {key: value.clone() if key != of else leaf for key, value in inputs.items()})
    (wanted,) = torch.autograd.grad((outputs["y"] ** 2).sum(), leaf)
    found = gradients(module.stages(module.boundaries(3)), inputs, of)
    assert wanted.abs().max() > 0
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-7)


def test_a_picture_does_not_travel_beyond_the_stage_that_looks_at_it() -> None:
    build, call, make, sizes = MODULES["resnet"]
    module = CutModule(build, call, make(*sizes[0]))
    first, _ = module.stages(module.boundaries(2))
    carry = first(make(3, 96))
    assert set(carry) == {ACTIVATION, f"{INPUT_SHAPE}pixel_values"}
    assert carry[f"{INPUT_SHAPE}pixel_values"].numel() == 0
    assert carry[f"{INPUT_SHAPE}pixel_values"].shape == (3, 0, 3, 96, 96)


def test_an_input_that_is_needed_late_travels() -> None:
    build, call, make, sizes = MODULES["glued"]
    module = CutModule(build, call, make(*sizes[0]))
    inputs = make(2, 33)
    carry = module.stages(module.boundaries(2))[0](dict(inputs))
    assert torch.equal(carry["scale"], inputs["scale"])


def test_what_forward_writes_into_stays_the_callers() -> None:
    build, call, make, sizes = MODULES["glued"]
    module = CutModule(build, call, make(*sizes[0]))
    assert module.trunk.trace.changed_inputs == {"pixel_values"}
    inputs = make(2, 33)
    before = inputs["pixel_values"].clone()
    module.stages(module.boundaries(2))[0](inputs)
    assert torch.equal(inputs["pixel_values"], before)


class Forked(torch.nn.Module):
    """Takes a short cut where its input says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers if x.sum() > 0 else self.layers[:0]:
            x = layer(x)
        return x


def test_a_step_that_takes_another_path_fails_instead_of_answering() -> None:
    module = CutModule(Forked, itself, {"x": torch.ones(2, 4)})
    stages = module.stages((0, 1, 3))
    assert torch.equal(chained(stages, {"x": torch.ones(3, 4)})["y"], module.whole({"x": torch.ones(3, 4)})["y"])
    with pytest.raises(ModelFailed, match=r"without reaching layers\.0"):
        stages[0]({"x": -torch.ones(2, 4)})


def test_an_authors_except_does_not_catch_the_way_out() -> None:
    class Careful(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                try:
                    x = layer(x)
                except Exception:  # noqa: BLE001 - what authors write
                    x = torch.zeros_like(x)
            return x

    module = CutModule(Careful, itself, {"x": torch.ones(2, 4)})
    inputs: Inputs = {"x": torch.randn(3, 4)}
    assert torch.equal(chained(module.stages((0, 2, 3)), inputs)["y"], module.whole(inputs)["y"])


def test_the_check_with_nan_bites() -> None:
    """A stage that looked at what is not its own would give NaN: shown by making one look."""
    build, call, make, sizes = MODULES["gpt2"]
    module = CutModule(build, call, make(*sizes[0]))
    stages = module.stages(module.boundaries(2))
    carry = stages[0](make(3, 11))
    seen: list[torch.Tensor] = []
    positions = stages[1]._modules["transformer.wpe"]
    positions.register_forward_hook(lambda _, __, output: seen.append(output))
    stages[1](carry)
    assert seen[0].isnan().all()
    assert seen[0].shape == (1, 11, 96)

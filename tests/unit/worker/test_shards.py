"""Tensor shards give what the whole model gives, forwards and backwards, and what cannot be cut is whole, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from shard_threads import Shards, from_file, from_whole
from torch import nn
from worker_wire import MODELS

from tensorway.errors import FailedPrecondition
from tensorway_worker.engines.cut.shards import Sharding, refuse_unsharded, shard_module
from tensorway_worker.engines.cut.tensor_plan import plan_of, resolve, summary
from tensorway_worker.topology import Place

#: Sums in another order differ in the last bits; this is the tolerance that is promised.
TOLERANCE = 1e-4
MINILM = MODELS / "minilm-ids" / "files"
SMOLLM2 = MODELS / "smollm2" / "files"


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within the tolerance, measured by the largest number of what is expected."""
    return got.shape == expected.shape and bool((got - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1.0))


def batch(vocabulary: int, length: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, vocabulary, (3, length), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def first(result: Any) -> torch.Tensor:
    output: torch.Tensor = result[0]
    return output


def forward(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return first(model(**inputs))


def gradient(model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the derivative of a weighted sum of it with respect to the embedded tokens."""
    embedded: list[torch.Tensor] = []

    def lift(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    hook = model.get_input_embeddings().register_forward_hook(lift)
    output = first(model(**inputs))
    hook.remove()
    weights = torch.linspace(-1, 1, output.shape[-1])
    (found,) = torch.autograd.grad((output * weights).sum(), embedded)
    return output.detach(), found


def same_as_whole(shards: Shards, whole: Any, inputs: Mapping[str, torch.Tensor]) -> None:
    expected = forward(whole, inputs)
    got = shards.run(lambda model: forward(model, inputs))
    assert all(close(one, expected) for one in got)
    # All shards hold the very same bits: what is not summed must not drift apart.
    assert all(torch.equal(one, got[0]) for one in got)
    output, derivative = gradient(whole, inputs)
    for one, its in shards.run(lambda model: gradient(model, inputs)):
        assert close(one, output) and close(its, derivative)


def num_elements(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def minilm() -> Any:
    return transformers.AutoModel.from_pretrained(MINILM).eval().requires_grad_(False)


@cache
def smollm2() -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, gguf_file="smollm2.gguf", dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.mark.models
@pytest.mark.parametrize("num_shards", [2, 3])
def test_minilm_in_shards(num_shards: int) -> None:
    config = minilm().config
    shards = Shards(num_shards, from_file(lambda: transformers.AutoModel.from_config(config), MINILM))
    assert summary(shards.shardings[0].kept_whole) == []
    same_as_whole(shards, minilm(), batch(30000))
    # Embeddings stay whole, the six layers are cut.
    assert num_elements(shards.models[0]) < num_elements(minilm())


@pytest.mark.models
@pytest.mark.parametrize(
    ("num_shards", "kept"), [(2, ["model.layers.*.self_attn: 9 heads and 3 key/value heads do not divide by 2"]), (3, [])]
)
def test_smollm2_in_shards(num_shards: int, kept: list[str]) -> None:
    config = smollm2().config
    shards = Shards(num_shards, from_file(lambda: transformers.AutoModelForCausalLM.from_config(config), SMOLLM2 / "smollm2.gguf"))
    assert summary(shards.shardings[0].kept_whole) == kept
    same_as_whole(shards, smollm2(), batch(49000))
    # A tied head and embedding are one slice of one tensor.
    assert shards.models[1].lm_head.weight is shards.models[1].model.embed_tokens.weight
    if num_shards == 3:
        norms = num_elements(smollm2().model.norm) * 61
        assert num_elements(shards.models[0]) == (num_elements(smollm2()) - norms) // 3 + norms


_SMALL = {"vocab_size": 96, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36,
          "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_LLAMA = {**_SMALL, "num_key_value_heads": 2, "head_dim": 6}
_EXPERTS = {**_LLAMA, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6, "first_k_dense_replace": 1,
        "head_dim": 4, "num_key_value_heads": 4,
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}  # fmt: skip


def built(kind: str, config: Mapping[str, Any]) -> tuple[Callable[[], Any], Any]:
    """How to make a small model of transformers' class `kind`, and one with random weights."""
    model_class = getattr(transformers, kind)

    def build() -> Any:
        return model_class(model_class.config_class(**config))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        whole = build().eval().requires_grad_(False)
        for parameter in whole.parameters():
            # Fresh biases and norms are all equal: an error in them would not show.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return build, whole


@pytest.mark.parametrize(
    "kind",
    [
        "BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel", "ElectraModel", "ErnieModel", "Data2VecTextModel",
        "DistilBertModel",
    ],
)
def test_encoders_have_a_plan(kind: str) -> None:
    names = {"dim": 24, "hidden_dim": 36, "n_heads": 4, "n_layers": 2} if kind == "DistilBertModel" else {"embedding_size": 24}
    build, whole = built(kind, {**_SMALL, **names})
    shards = Shards(2, from_whole(build, whole))
    assert shards.shardings[0].kept_whole == []
    assert len(shards.shardings[0].slices) == 2 * 10
    same_as_whole(shards, whole, batch(90))


@pytest.mark.parametrize(
    ("kind", "config", "kept"),
    [
        ("LlamaForCausalLM", _LLAMA, []),
        ("LlamaForCausalLM", {**_LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, []),
        ("Qwen3ForCausalLM", _LLAMA, []),  # norms of its own heads, kept whole by the plan
        ("Phi3ForCausalLM", _LLAMA, []),  # fused layers: joined at once, split again
        ("Olmo2ForCausalLM", _LLAMA, []),
        ("OPTForCausalLM", {**_SMALL, "ffn_dim": 36, "word_embed_proj_dim": 24}, None),
        ("Gemma2ForCausalLM", _LLAMA, ["model.embed_tokens"]),  # its embedding scales what it finds
        ("MixtralForCausalLM", _EXPERTS, ["model.layers.*.mlp"]),
        ("Qwen3MoeForCausalLM", _EXPERTS, ["model.layers.*.mlp"]),
        ("DeepseekV3ForCausalLM", {**_EXPERTS, **_MLA}, ["model.layers.*.mlp", "model.layers.*.mlp.shared_experts"]),
        ("GptOssForCausalLM", {**_EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, []),  # for its head alone
        ("LlamaForCausalLM", {**_LLAMA, "num_key_value_heads": 1}, ["model.layers.*.self_attn"]),
        ("LlamaForCausalLM", {**_LLAMA, "intermediate_size": 37}, ["model.layers.*.mlp"]),
    ],
)
def test_plans_of_transformers(kind: str, config: Mapping[str, Any], kept: list[str] | None) -> None:
    build, whole = built(kind, config)
    if kept is None:
        assert plan_of(whole) == {}
        return
    shards = Shards(2, from_whole(build, whole))
    titles = {kept for line in summary(shards.shardings[0].kept_whole) for kept in line.partition(":")[0].split(", ")}
    assert {title.removesuffix(".experts") for title in titles} == set(kept)
    assert shards.shardings[0].slices
    same_as_whole(shards, whole, batch(90))


def test_one_sum_a_block_each_way() -> None:
    build, whole = built("LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": True})
    shards = Shards(2, from_whole(build, whole))
    inputs = batch(90)
    shards.run(lambda model: forward(model, inputs))
    # Two blocks in each of two layers, and the vocabulary; the head's logits are joined.
    assert [(one.num_sums, one.num_gathers) for one in shards.collectives] == [(5, 1)] * 2
    shards.run(lambda model: gradient(model, inputs))
    # Backwards: where each of the four blocks begins (query, key and value share one), and where the head does.
    assert [(one.num_sums, one.num_gathers) for one in shards.collectives] == [(15, 2)] * 2


def test_without_gradients_no_function_of_autograd_is_entered() -> None:
    build, whole = built("LlamaForCausalLM", _LLAMA)
    shards = Shards(2, from_whole(build, whole))
    for output in shards.run(lambda model: first(model(**batch(90)))):
        assert output.grad_fn is None


def test_a_trace_on_meta_tensors_needs_no_other_shard() -> None:
    build, whole = built("LlamaForCausalLM", _LLAMA)
    shards = Shards(2, from_whole(build, whole))
    model = shards.models[0].to("meta")
    output = first(model(batch(90)["input_ids"].to("meta")))
    assert output.is_meta and output.shape == (3, 7, 96)
    assert shards.collectives[0].num_sums == 0


def test_an_id_outside_of_the_vocabulary_fails_on_every_shard() -> None:
    build, whole = built("LlamaForCausalLM", _LLAMA)
    shards = Shards(2, from_whole(build, whole))
    inputs = {"input_ids": torch.tensor([[5, 96]])}
    for shard in range(2):
        # Alone: no shard may wait for another that has failed.
        with pytest.raises(IndexError):
            forward(shards.models[shard], inputs)


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

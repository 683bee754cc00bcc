"""Tensor shards give what the whole model gives, forwards and backwards, and what cannot be cut is whole, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch
import transformers
from shard_checks import batch, first, forward, gradient, num_elements, same_as_whole
from shard_threads import Shards, from_file, from_whole
from worker_wire import MODELS

from tensorway_worker.engines.cut.tensor_plan import plan_of, summary
from tests.unit.worker import smollm2

MINILM = MODELS / "minilm-ids" / "files"


@cache
def minilm() -> Any:
    return transformers.AutoModel.from_pretrained(MINILM).eval().requires_grad_(False)


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
    whole = smollm2.transformers_own()
    build = partial(transformers.AutoModelForCausalLM.from_config, whole.config)
    shards = Shards(num_shards, from_file(build, smollm2.FILES / smollm2.WEIGHTS))
    assert summary(shards.shardings[0].kept_whole) == kept
    same_as_whole(shards, whole, batch(49000))
    # A tied head and embedding are one slice of one tensor.
    assert shards.models[1].lm_head.weight is shards.models[1].model.embed_tokens.weight
    if num_shards == 3:
        norms = num_elements(whole.model.norm) * 61
        assert num_elements(shards.models[0]) == (num_elements(whole) - norms) // 3 + norms


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

"""Weights files give single tensors and slices of them, and nothing of the rest."""

from __future__ import annotations

import gc
import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
import pytest
import torch
import transformers
from safetensors.torch import save_file

from tensorway.errors import FailedPrecondition
from tensorway_worker.engines.cut.empty import without_memory
from tensorway_worker.engines.cut.weights_source import Slice, WeightsSource, open_weights
from tests.unit.worker import smollm2


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "wide": torch.randn((6, 64), generator=generator),
        "deep": torch.randn((4, 6, 8), generator=generator).to(torch.bfloat16),
        "flat": torch.randn((96,), generator=generator),
        "count": torch.arange(12).reshape(3, 4),
        "scalar": torch.tensor(3.5),
    }


def as_safetensors(folder: Path) -> Path:
    save_file(tensors(), folder / "model.safetensors")
    return folder / "model.safetensors"


def as_index(folder: Path) -> Path:
    half = {"a.safetensors": ("wide", "count"), "b.safetensors": ("deep", "flat", "scalar")}
    for file, names in half.items():
        save_file({name: tensors()[name] for name in names}, folder / file)
    of_name = {name: file for file, names in half.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": of_name}))
    return folder  # a folder is looked into


def as_zip(folder: Path) -> Path:
    torch.save(tensors(), folder / "weights.pth")
    return folder / "weights.pth"


def as_legacy(folder: Path) -> Path:
    torch.save(tensors(), folder / "weights.bin", _use_new_zipfile_serialization=False)
    return folder / "weights.bin"


ADAPTERS = [as_safetensors, as_index, as_zip, as_legacy]


def every_slice(shape: tuple[int, ...]) -> list[Slice]:
    """Halves, an odd middle and the last element of every dimension."""
    found = []
    for dim, extent in enumerate(shape):
        spans = {(0, extent // 2), (extent // 2, extent - extent // 2), (1, max(1, extent // 3)), (extent - 1, 1)}
        found += [Slice(dim, start, length) for start, length in sorted(spans)]
    return found


def equals_its_slices(source: WeightsSource, name: str, whole: torch.Tensor) -> None:
    for part in every_slice(tuple(whole.shape)):
        got = source.load(name, part, None, "cpu")
        assert torch.equal(got, whole.narrow(part.dim, part.start, part.length)), part
        assert got.is_contiguous() and tuple(got.shape) == part.shape_of(whole.shape)
        # It keeps nothing else alive.
        assert got.untyped_storage().nbytes() == got.nbytes


@pytest.mark.parametrize("write", ADAPTERS, ids=lambda write: write.__name__)
def test_slices_are_slices_of_the_whole(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    source = open_weights(write(tmp_path))
    assert set(source.names()) == tensors().keys()
    for name, expected in tensors().items():
        assert source.shape(name) == tuple(expected.shape)
        whole = source.load(name, None, None, "cpu")
        assert whole.dtype == expected.dtype and torch.equal(whole, expected)
        assert whole.untyped_storage().nbytes() == whole.nbytes
        equals_its_slices(source, name, expected)


@pytest.mark.parametrize("write", ADAPTERS, ids=lambda write: write.__name__)
def test_only_floating_point_changes_its_type(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    source = open_weights(write(tmp_path))
    assert torch.equal(source.load("wide", None, torch.float16, "cpu"), tensors()["wide"].half())
    assert source.load("count", None, torch.float16, "cpu").dtype == torch.int64


@pytest.mark.parametrize("write", ADAPTERS, ids=lambda write: write.__name__)
def test_what_is_not_there_is_named(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    source = open_weights(write(tmp_path))
    with pytest.raises(FailedPrecondition, match="holds no tensor 'narrow'"):
        source.load("narrow", None, None, "cpu")
    for part in (Slice(0, 5, 2), Slice(2, 0, 1), Slice(0, -1, 1)):
        with pytest.raises(FailedPrecondition, match=r"wide is of shape \[6, 64\]; it has no elements"):
            source.load("wide", part, None, "cpu")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_slice_reads_only_its_own_part_of_the_file(tmp_path: Path, kind: str) -> None:
    """512 MiB on disk; taking 1/64 of it, row by row of one large tensor, must not bring the rest into memory."""
    rows, file = 64, tmp_path / f"large.{kind}"
    large = {"large": torch.ones((rows, 2 * 1024 * 1024))}
    if kind == "safetensors":
        save_file(large, file)
    else:
        torch.save(large, file)
    del large
    gc.collect()
    before = resident_bytes()
    source = open_weights(file)
    taken = source.load("large", Slice(0, 17, 1), None, "cpu")
    assert float(taken.sum()) == taken.numel()
    grown = resident_bytes() - before
    # Its own 8 MiB, as many that lie mapped, and what libraries allot; the whole tensor is 512 MiB.
    assert grown < 64 * 2**20


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", b"no such thing", "cannot be read as weights"),
        ("weights.pth", b"no such thing", "weights.pth"),
        ("weights.gguf", b"GGUF" + struct.pack("<I", 99) + bytes(64), "cannot be read as weights"),
        ("weights.gguf", b"", "cannot be read as weights"),
        ("model.safetensors.index.json", b"{}", "cannot be read as weights"),
        ("model.safetensors.index.json", b'{"weight_map": {"x": "../other.safetensors"}}', "must name files that lie beside it"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FailedPrecondition, match=said):
        open_weights(tmp_path / name)


def test_nothing_is_unpickled_unless_it_is_allowed(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2), "who": Path("somebody")}, tmp_path / "old.pth")
    with pytest.raises(FailedPrecondition, match=r"list it under settings\.unpickle"):
        open_weights(tmp_path / "old.pth")
    with pytest.raises(FailedPrecondition, match="is no state dict"):
        open_weights(tmp_path / "old.pth", unpickle=["old.pth"])
    torch.save({"x": torch.nn.Parameter(torch.ones(2))}, tmp_path / "new.pth")
    loaded = open_weights(tmp_path / "new.pth").load("x", None, None, "cpu")
    assert not loaded.requires_grad and torch.equal(loaded, torch.ones(2))


def test_a_missing_file_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="tensorway models fetch"):
        open_weights(tmp_path / "model.safetensors")
    with pytest.raises(FailedPrecondition, match=r"holds none of model\.safetensors"):
        open_weights(tmp_path)


_BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20}


def test_names_are_the_models_own(tmp_path: Path) -> None:
    """A head is given the tensors of a checkpoint without it, in an old spelling, and the other way round."""
    config = transformers.BertConfig(**_BERT)
    base, whole = transformers.BertModel(config), transformers.BertForSequenceClassification(config)
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): value for name, value in base.state_dict().items()}
    save_file(old, tmp_path / "base.safetensors")
    source = open_weights(tmp_path / "base.safetensors", (), whole)
    assert {f"bert.{name}" for name in base.state_dict()} == set(source.names())
    name = "embeddings.LayerNorm.weight"
    assert torch.equal(source.load(f"bert.{name}", Slice(0, 2, 3), None, "cpu"), base.state_dict()[name][2:5])
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    source = open_weights(tmp_path / "whole.safetensors", (), base)
    assert set(base.state_dict()) <= set(source.names())
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(source.load(name, None, None, "cpu"), whole.state_dict()[f"bert.{name}"])


def test_tensors_that_are_put_together_from_several_are_refused(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=12, vocab_size=20,
        num_local_experts=2,
    )
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    source = open_weights(tmp_path, (), model)
    with pytest.raises(FailedPrecondition, match="put together from several tensors"):
        source.load("model.layers.0.mlp.experts.down_proj", None, None, "cpu")
    assert source.shape("lm_head.weight") == (20, 8)
    model.save_pretrained(tmp_path / "merged", save_original_format=False)
    source = open_weights(tmp_path / "merged", (), model)
    for name, value in model.state_dict().items():
        assert torch.equal(source.load(name, None, None, "cpu"), value)


_LLAMA = {"general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 32,
          "llama.embedding_length": 256, "llama.feed_forward_length": 512, "llama.attention.head_count": 4,
          "llama.attention.head_count_kv": 2, "llama.vocab_size": 16}  # fmt: skip
_SHAPES = {"token_embd": (16, 256), "output_norm": (256,), "blk.0.attn_norm": (256,), "blk.0.ffn_norm": (256,), "blk.0.attn_q": (256, 256),
           "blk.0.attn_k": (128, 256), "blk.0.attn_v": (128, 256), "blk.0.attn_output": (256, 256), "blk.0.ffn_gate": (512, 256),
           "blk.0.ffn_up": (512, 256), "blk.0.ffn_down": (256, 512), "output": (16, 256)}  # fmt: skip


def write_gguf(path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """A Llama of one layer, its matrices stored as `kind`."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in _LLAMA.items():
        if isinstance(value, int):
            writer.add_uint32(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_token_list([f"token{index}" for index in range(16)])
    generator = numpy.random.default_rng(5)
    for name, shape in _SHAPES.items():
        values = generator.standard_normal(shape, dtype=numpy.float32)
        stored = gguf.quants.quantize(values, kind) if len(shape) == 2 else values
        raw = kind if len(shape) == 2 and kind.name not in ("F32", "F16") else None
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_gguf_gives_what_transformers_makes_of_it(tmp_path: Path, kind: str) -> None:
    write_gguf(tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind])
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    expected = reference.state_dict()
    source = open_weights(tmp_path / "model.gguf")
    assert set(source.names()) == expected.keys()
    for name, value in expected.items():
        assert source.shape(name) == tuple(value.shape)
        assert torch.equal(source.load(name, None, None, "cpu"), value), name
        equals_its_slices(source, name, value)
    assert torch.equal(source.load("lm_head.weight", None, torch.bfloat16, "cpu"), expected["lm_head.weight"].bfloat16())
    with pytest.raises(FailedPrecondition, match="it has no elements"):
        source.load("lm_head.weight", Slice(0, 10, 7), None, "cpu")


def test_gguf_of_a_model_that_transposes_and_permutes(tmp_path: Path) -> None:
    """GPT-2's layers lie the other way round in the file: the whole tensor is turned before a slice is taken."""
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=16, vocab_size=24)
    model = transformers.GPT2LMHeadModel(config)
    stored = {"token_embd.weight": "transformer.wte.weight", "position_embd.weight": "transformer.wpe.weight"}
    for part, name in (("attn_norm", "ln_1"), ("attn_qkv", "attn.c_attn"), ("attn_output", "attn.c_proj"), ("ffn_norm", "ln_2"),
                       ("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj")):  # fmt: skip
        stored |= {f"blk.0.{part}.{end}": f"transformer.h.0.{name}.{end}" for end in ("weight", "bias")}
    stored |= {f"output_norm.{end}": f"transformer.ln_f.{end}" for end in ("weight", "bias")}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt2")
    for name, own in stored.items():
        value = model.state_dict()[own].numpy()
        writer.add_tensor(name, numpy.ascontiguousarray(value.T) if value.ndim == 2 and name.startswith("blk") else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_weights(tmp_path / "model.gguf", (), model)
    for own in stored.values():
        value = model.state_dict()[own]
        assert source.shape(own) == tuple(value.shape)
        assert torch.equal(source.load(own, None, None, "cpu"), value), own
        equals_its_slices(source, own, value)


@pytest.mark.models
def test_smollm2_equals_what_transformers_reads() -> None:
    reference = smollm2.transformers_own()
    with without_memory():
        model = transformers.AutoModelForCausalLM.from_config(reference.config)
    source = open_weights(smollm2.FILES / smollm2.WEIGHTS, (), model)
    expected = reference.state_dict()
    assert expected.keys() - set(source.names()) == {"lm_head.weight"}  # tied
    for name in source.names():
        assert torch.equal(source.load(name, None, None, "cpu"), expected[name]), name
    for part in ("3.self_attn.q_proj", "3.self_attn.k_proj", "29.mlp.down_proj"):
        name = f"model.layers.{part}.weight"
        equals_its_slices(source, name, expected[name])
    # The configuration that lies beside the weights is the file's own.
    from tensorway_worker.engines.cut.gguf_source import gguf_config

    own, beside = (
        {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "_model_name_or_path", "architectures")}
        for config in (gguf_config(smollm2.FILES / smollm2.WEIGHTS), transformers.AutoConfig.from_pretrained(smollm2.FILES))
    )
    assert own == beside

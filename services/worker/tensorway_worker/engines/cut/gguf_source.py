"""GGUF weights files, dequantised tensor by tensor, or only the rows and blocks that a slice needs.

transformers can read these files too, but only whole: it dequantises every tensor before it looks at the first. What it knows about them
is used here, one tensor at a time: its names (`get_gguf_hf_weights_map`), its layouts (`TENSOR_PROCESSORS`: a Llama's query and key rows
are interleaved in the file), its configurations and its tokenisers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy
import torch
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFValueType
from gguf.quants import dequantize
from transformers import modeling_gguf_pytorch_utils as rules

from tensorway.errors import FailedPrecondition
from tensorway_worker.engines.cut.weights_source import Slice, check_name, check_slice, unreadable

#: Processors that leave a tensor alone or only change the order of its rows, so that rows can be chosen before they are dequantised.
_KEEP_ROWS: Final = (rules.TensorProcessor, rules.LlamaTensorProcessor, rules.T5TensorProcessor)


class GgufFile:
    """One GGUF file, mapped into memory, under the names and in the layout of a transformers model. Tensors come out as float32."""

    def __init__(self, path: Path, model: Any = None) -> None:
        """Reads the header.

        Args:
            model: the transformers model (on the meta device) that the tensors are for; None makes the causal language model that the
                file describes.

        Raises FailedPrecondition where that is no GGUF file, or transformers knows no names for it.
        """
        self._path = path
        try:
            reader = _HeaderReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise unreadable(path, error) from error
        if model is None:
            from transformers import AutoModelForCausalLM

            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(gguf_config(path))
        architecture = reader.get_field("general.architecture")
        kind = rules.TENSOR_PROCESSORS.get(str(architecture.contents()) if architecture else "", rules.TensorProcessor)
        self._processor = kind(config=model.config.to_dict())
        try:
            self._name_map = _name_map(model, self._processor)
        except NotImplementedError as error:
            raise FailedPrecondition(f"{path.name}: transformers cannot read this GGUF file: {error}", field="files") from error
        self._tensors = self._by_name(reader, frozenset(model.state_dict()))

    def _by_name(self, reader: GGUFReader, wanted: Collection[str]) -> Mapping[str, list[Any]]:
        """transformers' name -> the file's tensors that make it: one, or several (a mixture's experts)."""
        found: dict[str, list[Any]] = {}
        for tensor in reader.tensors:
            name = self._name_map.get(tensor.name) or self._name_map.get(tensor.name.removesuffix(".weight"), "")
            if name in wanted:
                found.setdefault(name, []).append(tensor)
        return found

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        check_name(self._path, self._tensors, name)
        tensors = self._tensors[name]
        if len(tensors) == 1 and type(self._processor) in _KEEP_ROWS:
            return tuple(int(extent) for extent in reversed(tensors[0].shape))
        # Only the processor knows what it makes of them.
        return tuple(self._processed(name, tensors, None).shape)

    def load(self, name: str, part: Slice | None, dtype: torch.dtype | None, device: str) -> torch.Tensor:
        shape = self.shape(name)
        check_slice(self._path, name, shape, part)
        tensors = self._tensors[name]
        can_choose = len(shape) >= 2 and len(tensors) == 1 and type(self._processor) in _KEEP_ROWS
        found = self._by_rows(tensors[0], part) if can_choose else self._processed(name, tensors, part)
        # What was dequantised is already memory of its own; a mapped float32 tensor is not, nor is a slice that keeps the rest alive.
        return torch.from_numpy(numpy.require(found, requirements=("C", "W"))).to(device, dtype)

    def _by_rows(self, tensor: Any, part: Slice | None) -> Any:
        """Dequantises only what lies in `part`: its rows, and of every row the blocks that cover it."""
        stored = tensor.data.view(numpy.uint8)
        rows = self._processor.process(numpy.arange(stored.shape[0]), tensor.name).weights
        if part is not None and part.dim == 0:
            rows = rows[part.start : part.start + part.length]
        block, block_bytes = GGML_QUANT_SIZES[tensor.tensor_type]
        last = part if part is not None and part.dim == stored.ndim - 1 else None
        if last is None:
            taken = dequantize(_rows(stored, rows), tensor.tensor_type)
            return taken if part is None or part.dim == 0 else taken[part.index()]
        first_block, end_block = last.start // block, -(-(last.start + last.length) // block)
        covering = numpy.ascontiguousarray(_rows(stored, rows)[..., first_block * block_bytes : end_block * block_bytes])
        taken = dequantize(covering, tensor.tensor_type)
        start = last.start - first_block * block
        return taken[..., start : start + last.length]

    def _processed(self, name: str, tensors: list[Any], part: Slice | None) -> Any:
        """The whole tensor put through transformers' processor, which may also write it into `parsed` itself."""
        parsed: dict[str, Any] = {"tensors": {}}
        result: Any = None
        for tensor in tensors:
            weights = dequantize(tensor.data, tensor.tensor_type)
            result = self._processor.process(
                weights=weights, name=tensor.name, tensor_key_mapping=self._name_map, parsed_parameters=parsed
            ).weights
        whole = parsed["tensors"][name].numpy() if name in parsed["tensors"] else result
        return whole if part is None else whole[part.index()]


def _rows(stored: Any, rows: Any) -> Any:
    """`stored[rows]`, without a copy where the rows are consecutive."""
    if len(rows) and (numpy.diff(rows) == 1).all():
        return stored[rows[0] : rows[-1] + 1]
    return stored[rows]


def gguf_config(path: Path) -> Any:
    """transformers' configuration made from the file's own metadata. Takes seconds where the file holds a large vocabulary: a
    config.json beside the weights saves them. Raises FailedPrecondition for an architecture that transformers does not know."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise FailedPrecondition(f"{path.name}: transformers cannot make a configuration of it: {error}", field="files") from error


def gguf_tokenizer(path: Path) -> Any:
    """The file's own vocabulary and merges as a `tokenizers.Tokenizer`. Takes seconds. Raises FailedPrecondition where it has none."""
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise FailedPrecondition(f"{path.name}: no tokeniser can be made of it: {error}", field="files") from error
    return made.backend_tokenizer


class _HeaderReader(GGUFReader):  # type: ignore[misc]
    """gguf's reader without the vocabulary: an array of strings is stepped over, not taken apart (2 s of 2.3 s for 49 000 tokens)."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if GGUFValueType(raw_type) is not GGUFValueType.ARRAY:
            found: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return found
        item_type = GGUFValueType(int(self._get(orig_offs, numpy.uint32)[0]))
        length = int(self._get(orig_offs + 4, numpy.uint64)[0])
        start = orig_offs + 12
        types = [GGUFValueType.ARRAY, item_type]
        if item_type is GGUFValueType.STRING:
            offset = start
            for _ in range(length):
                offset += 8 + int.from_bytes(self._bytes[offset : offset + 8], self._byteorder)
            return offset - orig_offs, [], [], types
        if item_type is GGUFValueType.ARRAY:
            nested: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return nested
        items = self._get(start, self.gguf_scalar_to_np[item_type], length)
        return 12 + int(items.nbytes), [items], [0], types

    @cached_property
    def _bytes(self) -> memoryview:
        return memoryview(self.data)

    @cached_property
    def _byteorder(self) -> Any:
        import sys

        swapped = {"little": "big", "big": "little"}
        return swapped[sys.byteorder] if self.byte_order == "S" else sys.byteorder


class _Names:
    """What `get_gguf_hf_weights_map` wants to know of a model. It asks every nested module again, though only the model itself and its
    direct children can answer: 4 s of a SmolLM2's start."""

    def __init__(self, model: torch.nn.Module, config: Any, depth: int) -> None:
        self.config = config
        self._model = model
        self._depth = depth

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._model.state_dict()

    def named_children(self) -> Iterator[tuple[str, _Names]]:
        if self._depth:
            for name, child in self._model.named_children():
                yield name, _Names(child, self.config, self._depth - 1)


def _name_map(model: Any, processor: Any) -> Mapping[str, str]:
    """The file's name of a tensor -> the model's."""
    found: dict[str, str] = rules.get_gguf_hf_weights_map(_Names(model, model.config, 1), processor)
    return found

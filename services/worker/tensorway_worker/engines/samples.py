"""Made-up inputs that a model can be run on: seeded, of the signature's dtypes and shapes, as real as can be without knowing the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from tensorway.errors import FailedPrecondition, TensorwayError
from tensorway.model import Inputs
from tensorway.signature import ROWS, RevisionSpec, TensorSpec
from tensorway.tensors import DataType
from tensorway_worker.engines.port import Engine

#: Extent of a dimension that varies. Odd, so that it is seldom one of the model's own widths.
LENGTH: Final = 11
_SEED: Final = 20260101
_FLOATS: Final = {
    DataType.FP16: torch.float16, DataType.BF16: torch.bfloat16, DataType.FP32: torch.float32, DataType.FP64: torch.float64,
}
_INTEGERS: Final = {
    DataType.UINT8: torch.uint8, DataType.UINT16: torch.uint16, DataType.UINT32: torch.uint32, DataType.UINT64: torch.uint64,
    DataType.INT8: torch.int8, DataType.INT16: torch.int16, DataType.INT32: torch.int32, DataType.INT64: torch.int64,
}


def sample_inputs(engine: Engine, spec: RevisionSpec, rows: int) -> Inputs:
    """Inputs of `engine.run` with `rows` rows, on the CPU; the same ones at every call.

    What the engine gives as `example`, else made by the signature and passed through `preprocess`. Raises FailedPrecondition where the
    model refuses what was made up (zero bytes are no picture).
    """
    given = engine.example(rows)
    if given is not None:
        return given
    made = made_up(spec.signature.inputs, rows, LENGTH, {})
    if not engine.has_preprocess:
        return made
    try:
        return engine.preprocess(made, {})
    except (TensorwayError, ValueError, TypeError, KeyError) as error:
        raise FailedPrecondition(
            f"{spec.model}: preprocess refuses made-up inputs ({error}); give the model an `example(rows)`", field="example"
        ) from error


def made_up(specs: Sequence[TensorSpec], rows: int, length: int, vocabulary: Mapping[str, int]) -> Inputs:
    """Tensors for `specs`, on the CPU.

    Args:
        length: extent of every dimension that varies, but for `rows`.
        vocabulary: integer input -> number of its values. Any other integer input is 0 or 1.

    An input called `attention_mask` is 1, but for the second half of the last row (where there are two or more), so that padding shows.
    """
    generator = torch.Generator().manual_seed(_SEED)
    return {spec.name: _value(spec, rows, length, vocabulary.get(spec.name, 2), generator) for spec in specs}


def _value(spec: TensorSpec, rows: int, length: int, num_values: int, generator: torch.Generator) -> torch.Tensor:
    shape = tuple(extent if isinstance(extent, int) else rows if extent == ROWS else length for extent in spec.shape)
    if spec.dtype is DataType.BYTES:
        return _texts(shape)
    if spec.dtype is DataType.BOOL:
        return torch.ones(shape, dtype=torch.bool)
    if spec.dtype in _FLOATS:
        return torch.randn(shape, generator=generator).to(_FLOATS[spec.dtype])
    dtype = _INTEGERS[spec.dtype]
    if spec.name == "attention_mask":
        mask = torch.ones(shape, dtype=dtype)
        if len(mask) > 1:
            mask[-1, (mask.shape[1] + 1) // 2 :] = 0
        return mask
    if spec.name == "position_ids":
        return torch.arange(shape[-1], dtype=dtype).expand(shape).contiguous()
    return torch.randint(0, num_values, shape, generator=generator).to(dtype)


def _texts(shape: tuple[int, ...]) -> torch.Tensor:
    import numpy

    texts = numpy.empty(shape, dtype=object)
    texts.fill(b"")
    # A BYTES tensor is an object array; only its type says otherwise.
    return texts  # type: ignore[return-value]

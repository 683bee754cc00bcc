"""Bytes off the wire as torch tensors and numpy object arrays, and back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Final

import numpy
import torch

from tensorway.errors import ModelFailed
from tensorway.model import Value
from tensorway.tensors import Buffer, DataType, check_bytes_elements, decode_bytes, encode_bytes, num_elements
from tensorway.transport.port import Payload

TORCH_OF: Final[dict[DataType, torch.dtype]] = {
    DataType.BOOL: torch.bool,
    DataType.UINT8: torch.uint8,
    DataType.UINT16: torch.uint16,
    DataType.UINT32: torch.uint32,
    DataType.UINT64: torch.uint64,
    DataType.INT8: torch.int8,
    DataType.INT16: torch.int16,
    DataType.INT32: torch.int32,
    DataType.INT64: torch.int64,
    DataType.FP16: torch.float16,
    DataType.BF16: torch.bfloat16,
    DataType.FP32: torch.float32,
    DataType.FP64: torch.float64,
}
DATA_TYPE_OF: Final[dict[torch.dtype, DataType]] = {dtype: data_type for data_type, dtype in TORCH_OF.items()}

#: A single-byte `bytes` object may be shared by the whole interpreter; a model may write into its inputs, so up to here they are copied.
_ALWAYS_COPY_BYTES: Final = 64

with warnings.catch_warnings():
    # torch warns once in a process that received bytes are not writable. Nobody else reads them after us, so writing is harmless.
    warnings.simplefilter("ignore", UserWarning)
    torch.frombuffer(b"\0", dtype=torch.uint8)


def value_of(dtype: DataType, shape: Sequence[int], pieces: Payload, name: str) -> Value:
    """One tensor of checked length. Large contiguous pieces are not copied: the tensor lies on the received bytes.

    Raises InvalidRequest where BYTES content is malformed.
    """
    if dtype is DataType.BYTES:
        return _objects(shape, pieces, name)
    data: Buffer = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    if not len(data):
        return torch.empty(tuple(shape), dtype=TORCH_OF[dtype])
    if dtype is DataType.BOOL:
        # Any other byte than 0 and 1 would be undefined behaviour in a bool tensor.
        return torch.frombuffer(data, dtype=torch.uint8).ne(0).reshape(tuple(shape))
    return flat_tensor(data, TORCH_OF[dtype]).reshape(tuple(shape))


def flat_tensor(data: Buffer, dtype: torch.dtype) -> torch.Tensor:
    """A 1-d tensor on `data` (not empty), copied only where it is tiny or not aligned for `dtype`."""
    tensor = torch.frombuffer(data, dtype=dtype)
    if tensor.nbytes <= _ALWAYS_COPY_BYTES or tensor.data_ptr() % dtype.itemsize:
        return tensor.clone()
    return tensor


def pinned_tensor(pieces: Sequence[Buffer], dtype: torch.dtype, num_bytes: int) -> torch.Tensor:
    """A 1-d tensor in page-locked memory with the bytes of `pieces`, each copied once: the fastest source for a copy to a GPU."""
    raw = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    view = memoryview(raw.numpy().data)
    offset = 0
    for piece in pieces:
        view[offset : offset + len(piece)] = piece
        offset += len(piece)
    return raw.view(dtype)


def _objects(shape: Sequence[int], pieces: Payload, name: str) -> numpy.ndarray[Any, Any]:
    data: Buffer = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    count = num_elements(shape, f"inputs.{name}")
    check_bytes_elements(data, count, f"inputs.{name}")
    return object_array(decode_bytes(data), shape)


def object_array(elements: Sequence[bytes], shape: Sequence[int]) -> numpy.ndarray[Any, Any]:
    """A numpy object array of `elements`; numpy's own constructors would guess at a string dtype."""
    array: numpy.ndarray[Any, Any] = numpy.empty(len(elements), dtype=object)
    for index, element in enumerate(elements):
        array[index] = element
    return array.reshape(tuple(shape))


def bytes_of(value: Value) -> Buffer:
    """The row-major content of a CPU tensor, without a copy where it is contiguous, or of an object array.

    Raises ModelFailed where an object array holds anything but bytes or str.
    """
    if isinstance(value, torch.Tensor):
        if not value.numel():
            return b""
        if value.requires_grad:
            value = value.detach()
        flat = value.contiguous().reshape(-1)
        # A single element keeps whatever stride it had, which a view as bytes does not take.
        flat = flat.as_strided(flat.shape, (1,))
        return flat.view(torch.uint8).numpy().data
    return encode_bytes(_element(element) for element in value.reshape(-1).tolist())


def _element(element: object) -> bytes:
    if isinstance(element, bytes):
        return element
    if isinstance(element, str):
        return element.encode()
    raise ModelFailed(f"a BYTES output holds a {type(element).__name__}; use bytes or str")

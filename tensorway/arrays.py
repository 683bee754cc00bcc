"""Arrays and tensors: what a Python caller holds, and what the wire carries.

numpy is imported inside the functions, and torch only where the caller hands in or asks for a torch tensor. BF16, which numpy lacks, is
taken from torch tensors or `bfloat16()`, and comes back as float32, which holds every BF16 value exactly.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tensorway.errors import InvalidRequest
from tensorway.signature import TensorSpec
from tensorway.tensors import ITEM_SIZE, Buffer, DataType, Tensor, decode_bytes, encode_bytes

if TYPE_CHECKING:
    import numpy as np
    import torch

#: numpy's little-endian type codes.
_CODES: Final = {
    DataType.BOOL: "|b1",
    DataType.UINT8: "|u1",
    DataType.UINT16: "<u2",
    DataType.UINT32: "<u4",
    DataType.UINT64: "<u8",
    DataType.INT8: "|i1",
    DataType.INT16: "<i2",
    DataType.INT32: "<i4",
    DataType.INT64: "<i8",
    DataType.FP16: "<f2",
    DataType.FP32: "<f4",
    DataType.FP64: "<f8",
}
_DTYPES: Final = {code[1:]: dtype for dtype, code in _CODES.items()}


@dataclass(frozen=True, slots=True)
class RawArray:
    """Bytes that already have the wire's layout."""

    dtype: DataType
    shape: tuple[int, ...]
    data: Buffer


def to_tensor(name: str, value: Any) -> Tensor:
    """The tensor named `name` for what a caller holds.

    Takes numpy arrays, torch tensors, `RawArray`, numbers, and (nested) lists; Python floats become FP32 and integers INT64, as in torch.
    Strings and bytes become BYTES (strings as UTF-8); a single one is one row: shape [1]. Contiguous arrays are not copied. Raises
    InvalidRequest for anything that has no data type on the wire.
    """
    if isinstance(value, (Tensor, RawArray)):
        return Tensor(name, value.dtype, value.shape, value.data)
    if isinstance(value, (str, bytes, bytearray)):
        return Tensor(name, DataType.BYTES, (1,), encode_bytes((_as_bytes(name, value),)))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _from_torch(name, value)
    return _from_numpy(name, _as_numpy(name, value))


def bfloat16(values: Any) -> RawArray:
    """`values` rounded to the nearest BF16 (ties to even), for callers without torch."""
    import numpy as np

    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    # Rounding must not turn a NaN with a small payload into infinity.
    rounded = np.where((bits & 0x7FFFFFFF) > 0x7F800000, ((bits >> 16) | 0x40).astype("<u2"), rounded)
    return RawArray(DataType.BF16, np.shape(values), rounded.tobytes())


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The tensor as a read-only numpy array on the received bytes; BYTES as an object array of `bytes`, BF16 as float32."""
    import numpy as np

    if tensor.dtype is DataType.BYTES:
        elements = np.empty(len(decoded := decode_bytes(tensor.data)), dtype=object)
        elements[:] = decoded
        return elements.reshape(tensor.shape)
    if tensor.dtype is DataType.BF16:
        wide = np.frombuffer(tensor.data, dtype="<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(tensor.shape)
    return np.frombuffer(tensor.data, dtype=_CODES[tensor.dtype]).reshape(tensor.shape)


def to_torch(tensor: Tensor) -> torch.Tensor:
    """The tensor as a torch tensor of its own memory. Raises InvalidRequest for BYTES, which torch cannot hold."""
    import torch

    if tensor.dtype is DataType.BYTES:
        raise InvalidRequest(f"{tensor.name!r} is BYTES, which torch cannot hold; read it as numpy", field=tensor.name)
    if not tensor.data:
        return torch.empty(tensor.shape, dtype=_torch_dtype(torch, tensor.dtype))
    # A writable buffer: torch may write into what it is given.
    return torch.frombuffer(bytearray(tensor.data), dtype=_torch_dtype(torch, tensor.dtype)).reshape(tensor.shape)


def _torch_dtype(torch: Any, dtype: DataType) -> Any:
    if dtype is DataType.BF16:
        return torch.bfloat16
    word = dtype.name.lower().replace("fp", "float")
    return getattr(torch, word)


def _from_torch(name: str, value: Any) -> Tensor:
    import torch

    value = value.detach()
    if value.layout is not torch.strided or value.is_quantized or value.is_complex():
        raise _unsupported(name, f"{value.dtype} tensor of layout {value.layout}")
    value = value.cpu().contiguous().resolve_neg()
    if value.dtype is torch.bfloat16:
        bits = _from_numpy(name, value.view(torch.int16).numpy())
        return Tensor(name, DataType.BF16, bits.shape, bits.data)
    try:
        array = value.numpy()
    except TypeError as error:
        raise _unsupported(name, str(value.dtype)) from error
    return _from_numpy(name, array)


def _as_numpy(name: str, value: Any) -> np.ndarray[Any, Any]:
    import numpy as np

    if isinstance(value, (np.ndarray, np.generic)):
        return np.asarray(value)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InvalidRequest(f"input {name!r}: is no rectangular array: {error}", field=name) from error
    if array.dtype.kind in "SU":
        # numpy's own strings are of one length: they would pad these and cut their trailing zeros.
        return np.asarray(value, dtype=object)
    if not isinstance(value, (bool, int, float, list, tuple, range)):
        return array
    if array.dtype == np.float64:
        return array.astype(np.float32)
    return array


def _from_numpy(name: str, array: np.ndarray[Any, Any]) -> Tensor:
    import numpy as np

    kind = array.dtype.kind
    if kind in "SUO":
        flat = array.reshape(-1).tolist()
        return Tensor(name, DataType.BYTES, array.shape, encode_bytes([_as_bytes(name, item) for item in flat]))
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
        dtype = DataType.BF16
    else:
        found = _DTYPES.get(array.dtype.str[1:])
        if found is None:
            raise _unsupported(name, str(array.dtype))
        dtype = found
        array = array.astype(_CODES[dtype], copy=False)
    shape = array.shape
    flat_bytes = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return Tensor(name, dtype, shape, flat_bytes.data if flat_bytes.size else b"")


def _as_bytes(name: str, value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise _unsupported(name, f"element of type {type(value).__name__}")


def _unsupported(name: str, what: str) -> InvalidRequest:
    known: Iterable[str] = (dtype.name for dtype in (*ITEM_SIZE, DataType.BYTES))
    return InvalidRequest(f"input {name!r}: {what} cannot be sent; the wire knows {', '.join(known)}", field=name)


def from_nested(spec: TensorSpec, value: Any) -> Tensor:
    """The tensor for one input of a signature from nested lists, as JSON gives them. A missing `rows` dimension is added as one row.

    Raises InvalidRequest where the values do not fit the input's data type.
    """
    import numpy as np

    try:
        if spec.dtype is DataType.BYTES:
            array = np.asarray(value, dtype=object)
        else:
            array = np.asarray(value, dtype="<f4" if spec.dtype is DataType.BF16 else _CODES[spec.dtype])
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequest(f"input {spec.name!r}: is no array of {spec.dtype.name}: {error}", field=spec.name) from error
    if array.ndim == len(spec.shape) - 1 and spec.has_rows:
        array = array[np.newaxis]
    return to_tensor(spec.name, bfloat16(array) if spec.dtype is DataType.BF16 else array)


def load_npy(name: str, path: Path) -> Tensor:
    """The tensor in an `.npy` file, without unpickling anything. Raises InvalidRequest where it cannot be read."""
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"input {name!r}: {path} cannot be read as .npy: {error}", field=name) from error
    return to_tensor(name, array)


def preview(tensor: Tensor, num_items: int = 3) -> str:
    """The first and last values of a tensor, short enough for a line of a table."""
    import numpy as np

    if tensor.dtype is DataType.BYTES:
        decoded = decode_bytes(tensor.data)
        shown = [repr(item[:60].decode(errors="replace")) for item in decoded[:num_items]]
        return ", ".join([*shown, "…"] if len(decoded) > num_items else shown)
    return np.array2string(to_numpy(tensor), precision=5, threshold=4 * num_items, edgeitems=num_items, max_line_width=100)


def to_nested(tensor: Tensor) -> Any:
    """All values as nested lists for JSON; BYTES as text, with what is not UTF-8 replaced."""
    array = to_numpy(tensor)
    if tensor.dtype is DataType.BYTES:
        flat = [element.decode(errors="replace") for element in decode_bytes(tensor.data)]
        array = array.copy()
        array.reshape(-1)[:] = flat
    return array.tolist()

"""Reading safetensors files as the wire's tensors, without an array library.

The format (https://github.com/huggingface/safetensors): 8 bytes, little-endian, the length of a JSON header; the header, which maps names
to type, shape and offsets; then the tensors, row-major and little-endian, as on the wire.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Final

from tensorway.errors import InvalidRequest
from tensorway.tensors import DataType, Tensor, check_num_bytes

_DTYPES: Final = {
    "BOOL": DataType.BOOL, "U8": DataType.UINT8, "U16": DataType.UINT16, "U32": DataType.UINT32, "U64": DataType.UINT64,
    "I8": DataType.INT8, "I16": DataType.INT16, "I32": DataType.INT32, "I64": DataType.INT64, "F16": DataType.FP16, "BF16": DataType.BF16,
    "F32": DataType.FP32, "F64": DataType.FP64,
}  # fmt: skip
_LENGTH: Final = struct.Struct("<Q")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the file, by name. Raises InvalidRequest where it cannot be read, or is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}", field=str(path)) from error
    try:
        (length,) = _LENGTH.unpack_from(content)
        if length > len(content) - _LENGTH.size:
            raise ValueError("its header is longer than the file")
        header: dict[str, Any] = json.loads(content[8 : 8 + length])
        found = {name: _tensor(name, item, memoryview(content)[8 + length :]) for name, item in header.items() if name != "__metadata__"}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"{path} is no safetensors file: {error}", field=str(path)) from error
    for tensor in found.values():
        check_num_bytes(tensor.dtype, tensor.shape, tensor.data, tensor.name)
    return found


def _tensor(name: str, item: dict[str, Any], body: memoryview) -> Tensor:
    if item["dtype"] not in _DTYPES:
        raise ValueError(f"{name} is of type {item['dtype']}, which is not one of {', '.join(_DTYPES)}")
    begin, end = item["data_offsets"]
    return Tensor(name, _DTYPES[item["dtype"]], tuple(item["shape"]), body[begin:end])

"""Tensors as the wire sees them: a name, a dtype, a shape and raw bytes. No array library is needed to carry or to check one.

Layout (shared with OIP v2): row-major, little-endian, no padding. A BYTES element is a 4-byte little-endian length and that many bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from tensorway.errors import InvalidRequest

#: Bytes that may stand for a tensor's content without being copied.
Buffer = bytes | memoryview

#: Largest number of elements a shape may name; guards the product against absurd shapes long before memory is touched.
MAX_NUM_ELEMENTS: Final = 1 << 40


class DataType(IntEnum):
    """Element types; the numbers are those of `tensorway.v1.DataType`."""

    BOOL = 1
    UINT8 = 2
    UINT16 = 3
    UINT32 = 4
    UINT64 = 5
    INT8 = 6
    INT16 = 7
    INT32 = 8
    INT64 = 9
    FP16 = 10
    BF16 = 11
    FP32 = 12
    FP64 = 13
    BYTES = 14


#: Bytes per element; BYTES has none of its own.
ITEM_SIZE: Final[dict[DataType, int]] = {
    DataType.BOOL: 1,
    DataType.UINT8: 1,
    DataType.UINT16: 2,
    DataType.UINT32: 4,
    DataType.UINT64: 8,
    DataType.INT8: 1,
    DataType.INT16: 2,
    DataType.INT32: 4,
    DataType.INT64: 8,
    DataType.FP16: 2,
    DataType.BF16: 2,
    DataType.FP32: 4,
    DataType.FP64: 8,
}

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class TensorHead:
    """What is known of a tensor without its bytes. `num_bytes` is the length of its bytes in the payload."""

    name: str
    dtype: DataType
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor and its bytes."""

    name: str
    dtype: DataType
    shape: tuple[int, ...]
    data: Buffer

    @property
    def head(self) -> TensorHead:
        return TensorHead(self.name, self.dtype, self.shape, len(self.data))


def num_elements(shape: Sequence[int], field: str) -> int:
    """Product of `shape` (1 for a scalar); raises InvalidRequest for a negative extent or an absurd product."""
    if shape and min(shape) < 0:
        raise InvalidRequest(f"{field}: shape {list(shape)} has a negative extent", field=field)
    count = math.prod(shape)
    if count > MAX_NUM_ELEMENTS:
        raise InvalidRequest(f"{field}: shape {list(shape)} names {count} elements, more than {MAX_NUM_ELEMENTS}", field=field)
    return count


def check_num_bytes(dtype: DataType, shape: Sequence[int], data: Buffer, field: str) -> None:
    """Raises InvalidRequest where `data` is not exactly the bytes that dtype and shape ask for."""
    count = num_elements(shape, field)
    if dtype is DataType.BYTES:
        check_bytes_elements(data, count, field)
        return
    expected = count * ITEM_SIZE[dtype]
    if len(data) != expected:
        raise InvalidRequest(
            f"{field}: {dtype.name} of shape {list(shape)} needs {expected} bytes, got {len(data)}", field=field
        )


def check_bytes_elements(data: Buffer, count: int, field: str) -> None:
    """Raises InvalidRequest where `data` is not exactly `count` length-prefixed elements. Trusts no length it reads."""
    offset, end = 0, len(data)
    if count * 4 > end:
        raise InvalidRequest(f"{field}: {count} BYTES elements need at least {count * 4} bytes, got {end}", field=field)
    for index in range(count):
        if offset + 4 > end:
            raise InvalidRequest(f"{field}: BYTES element {index} of {count} has no 4-byte length prefix left", field=field)
        (length,) = _LENGTH.unpack_from(data, offset)
        offset += 4 + length
        if offset > end:
            raise InvalidRequest(
                f"{field}: BYTES element {index} claims {length} bytes, only {end - offset + length} are left", field=field
            )
    if offset != end:
        raise InvalidRequest(f"{field}: {end - offset} bytes follow the last of {count} BYTES elements", field=field)


def encode_bytes(elements: Iterable[bytes]) -> bytes:
    """Length-prefixed BYTES content of `elements`, in order."""
    parts: list[bytes] = []
    for element in elements:
        parts.append(_LENGTH.pack(len(element)))
        parts.append(element)
    return b"".join(parts)


def decode_bytes(data: Buffer) -> list[bytes]:
    """The elements of checked BYTES content."""
    elements: list[bytes] = []
    offset, end = 0, len(data)
    while offset < end:
        (length,) = _LENGTH.unpack_from(data, offset)
        offset += 4
        elements.append(bytes(data[offset : offset + length]))
        offset += length
    return elements

"""Lifts large tensor bytes out of a request before protobuf parses it: they stay where the transport put them.

protobuf copies a bytes field when it parses and again when the field is read. Here the message is walked once, what is large is cut out as
a view, and protobuf parses the rest. Wherever the walk meets something it does not understand, nothing is lifted and protobuf alone judges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tensorway.tensor_message import varint

#: Smaller bytes are cheaper to copy than to lift.
THRESHOLD_BYTES: Final = 64 * 1024
_LENGTH_DELIMITED: Final = 2
_MAX_TAG: Final = 2**32 - 1
_INPUTS: Final = 4
_DATA: Final = 4
_RAW_INPUTS: Final = 7
#: Tags of the fields that are written anew: `InferRequest.inputs`, and an empty `ModelInferRequest.raw_input_contents`.
_INPUTS_TAG: Final = b"\x22"
_EMPTY_RAW_INPUT: Final = b"\x3a\x00"


class _Odd(Exception):
    """The walk met what it does not understand."""


def lift_tensors(message: bytes, threshold_bytes: int = THRESHOLD_BYTES) -> tuple[bytes, dict[int, memoryview]]:
    """`message` (an InferRequest) without the `data` of its large inputs, and that data by index of the input."""

    def lift(body: memoryview, index: int, lifted: dict[int, memoryview]) -> bytes | None:
        rest = _without_data(body, index, lifted, threshold_bytes)
        return None if rest is None else b"".join((_INPUTS_TAG, varint(len(rest)), rest))

    return _lift(message, _INPUTS, threshold_bytes, lift)


def lift_raw_contents(message: bytes, threshold_bytes: int = THRESHOLD_BYTES) -> tuple[bytes, dict[int, memoryview]]:
    """`message` (a ModelInferRequest) with its large raw_input_contents emptied, and what they held by index."""

    def lift(body: memoryview, index: int, lifted: dict[int, memoryview]) -> bytes:
        lifted[index] = body
        return _EMPTY_RAW_INPUT

    return _lift(message, _RAW_INPUTS, threshold_bytes, lift)


def _lift(
    message: bytes, wanted: int, threshold_bytes: int, lift: Callable[[memoryview, int, dict[int, memoryview]], bytes | None]
) -> tuple[bytes, dict[int, memoryview]]:
    """Walks `message` and has `lift` put the large ones of its fields `wanted` aside; it returns what stays in their place, or None."""
    if len(message) < threshold_bytes:
        return message, {}
    view = memoryview(message)
    kept: list[bytes | memoryview] = []
    lifted: dict[int, memoryview] = {}
    offset = index = 0
    try:
        while offset < len(view):
            start, field, body, offset = _field(view, offset)
            rest: bytes | None = None
            if field == wanted and body is not None:
                rest = lift(body, index, lifted) if len(body) >= threshold_bytes else None
                index += 1
            kept.append(view[start:offset] if rest is None else rest)
    except _Odd:
        return message, {}
    return (b"".join(kept), lifted) if lifted else (message, {})


def _without_data(tensor: memoryview, index: int, lifted: dict[int, memoryview], threshold_bytes: int) -> bytes | None:
    """A serialised Tensor without its `data`, which goes into `lifted`; None where the last `data` (the one that counts) is small."""
    kept: list[memoryview] = []
    data: memoryview | None = None
    offset = 0
    while offset < len(tensor):
        start, field, body, offset = _field(tensor, offset)
        if field == _DATA and body is not None:
            data = body
        else:
            kept.append(tensor[start:offset])
    if data is None or len(data) < threshold_bytes:
        return None
    lifted[index] = data
    return b"".join(kept)


def _field(view: memoryview, offset: int) -> tuple[int, int, memoryview | None, int]:
    """One field: where it starts, its number, its bytes where it is length-delimited, and where it ends."""
    start = offset
    tag, offset = _read_varint(view, offset)
    number, kind = tag >> 3, tag & 7
    if number == 0 or tag > _MAX_TAG:
        raise _Odd
    if kind == _LENGTH_DELIMITED:
        length, offset = _read_varint(view, offset)
        end = offset + length
        if end > len(view):
            raise _Odd
        return start, number, view[offset:end], end
    if kind == 0:
        _, offset = _read_varint(view, offset)
    elif kind == 1:
        offset += 8
    elif kind == 5:
        offset += 4
    else:
        raise _Odd
    if offset > len(view):
        raise _Odd
    return start, number, None, offset


def _read_varint(view: memoryview, offset: int) -> tuple[int, int]:
    """A varint of up to 10 bytes, and where it ends."""
    value = shift = 0
    for position in range(offset, min(offset + 10, len(view))):
        byte = view[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + 1
        shift += 7
    raise _Odd


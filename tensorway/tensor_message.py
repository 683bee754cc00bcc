"""`tensorway.v1.Tensor` framed by hand inside a larger message, so that its bytes are copied once: into that message.

protobuf itself would copy them when the field is set and again when the message is serialised. Fields may come in any order on the wire, so
tensors can simply be appended to a serialised message that lacks them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tensorway.tensors import Buffer, TensorHead
from tensorway.v1 import tensor_pb2

#: `InferRequest.inputs` and `InferResponse.outputs` are both field 4 with a length; so is `Tensor.data`.
_TENSORS_TAG: Final = b"\x22"
_DATA_TAG: Final = b"\x22"


def varint(number: int) -> bytes:
    """`number` (not negative) as protobuf writes a length."""
    if number < 0x80:
        return bytes((number,))
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


def tensor_field(head: TensorHead, content: Iterable[Buffer]) -> tuple[Buffer, ...]:
    """One entry of `InferRequest.inputs` or `InferResponse.outputs` as segments to join. `content` has `head.num_bytes` bytes in all."""
    described = tensor_pb2.Tensor(name=head.name, dtype=head.dtype, shape=head.shape).SerializeToString()  # type: ignore[arg-type]
    length = varint(head.num_bytes)
    size = varint(len(described) + len(_DATA_TAG) + len(length) + head.num_bytes)
    return (_TENSORS_TAG, size, described, _DATA_TAG, length, *content)

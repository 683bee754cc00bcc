"""Tensors as the Open Inference Protocol v2 writes them: datatype names, raw contents, and typed lists."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from tensorway.compat import grpc_service_pb2
from tensorway.errors import InvalidRequest, Unimplemented
from tensorway.tensors import Buffer, DataType, Tensor, TensorHead, decode_bytes, encode_bytes, num_elements
from tensorway.transport.port import Payload
from tensorway_gateway.requests import MAX_NUM_DIMENSIONS, MAX_NUM_ITEMS

#: Our element types by the protocol's names, which are the same words.
_DTYPES: Final[Mapping[str, DataType]] = dict(DataType.__members__)


class _TypedList(NamedTuple):
    """The list of InferTensorContents that holds a datatype, and the array code of its elements; "" for those that are not numbers."""

    field: str
    code: str


_TYPED: Final[dict[DataType, _TypedList]] = {
    DataType.BOOL: _TypedList("bool_contents", ""),
    DataType.INT8: _TypedList("int_contents", "b"),
    DataType.INT16: _TypedList("int_contents", "h"),
    DataType.INT32: _TypedList("int_contents", "i"),
    DataType.INT64: _TypedList("int64_contents", "q"),
    DataType.UINT8: _TypedList("uint_contents", "B"),
    DataType.UINT16: _TypedList("uint_contents", "H"),
    DataType.UINT32: _TypedList("uint_contents", "I"),
    DataType.UINT64: _TypedList("uint64_contents", "Q"),
    DataType.FP32: _TypedList("fp32_contents", "f"),
    DataType.FP64: _TypedList("fp64_contents", "d"),
    DataType.BYTES: _TypedList("bytes_contents", ""),
}
#: Parameter of a request: false asks for typed contents instead of raw ones, which JSON shows as numbers.
BINARY_OUTPUT: Final = "binary_data_output"
_SHARED_MEMORY: Final = "shared_memory_region"


def oip_field(_index: int, name: str, part: str) -> str:
    """`input 'x' shape`: OIP clients know their inputs by name."""
    return f"input {name!r} {part}"


def read_inputs(request: grpc_service_pb2.ModelInferRequest, lifted: Mapping[int, Buffer]) -> tuple[Tensor, ...]:
    """All inputs with their bytes, raw or typed; `lifted` holds raw contents that were cut out of the message, by index.

    Raises InvalidRequest naming the input, or Unimplemented for shared memory.
    """
    if len(request.inputs) > MAX_NUM_ITEMS:
        raise InvalidRequest(f"inputs: {len(request.inputs)} are more than {MAX_NUM_ITEMS}", field="inputs")
    # Each access of a bytes field copies it: once is enough.
    raw: list[Buffer] = list(request.raw_input_contents)
    for index, content in lifted.items():
        raw[index] = content
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            f"raw_input_contents: has {len(raw)} entries for {len(request.inputs)} inputs; it needs one for each",
            field="raw_input_contents",
        )
    return tuple(_read_input(item, raw[index] if raw else None) for index, item in enumerate(request.inputs))


def write_contents(head: TensorHead, content: Payload, contents: grpc_service_pb2.InferTensorContents) -> None:
    """An output's elements as the typed list of its datatype. Raises InvalidRequest for a datatype that has none."""
    typed = _TYPED.get(head.dtype)
    if typed is None:
        where = f"parameter {BINARY_OUTPUT!r}"
        raise InvalidRequest(f"{where}: output {head.name!r} is {head.dtype.name}, which has no typed contents; leave it out", field=where)
    raw = b"".join(content)
    target = getattr(contents, typed.field)
    if head.dtype is DataType.BYTES:
        target.extend(decode_bytes(raw))
    elif head.dtype is DataType.BOOL:
        target.extend(map(bool, raw))
    else:
        elements = array(typed.code, raw)
        if sys.byteorder == "big":
            elements.byteswap()
        target.extend(elements)


def refuse_unserved_parameters(where: str, parameters: Mapping[str, object]) -> None:
    """Raises Unimplemented where a tensor's parameters ask for what is not served here: shared memory or classification."""
    if _SHARED_MEMORY in parameters:
        raise Unimplemented(f"{where}: shared memory is not served here; send the tensor's bytes in the message", field=where)
    if "classification" in parameters:
        raise Unimplemented(f"{where}: classification is not served here; ask for the scores and sort them", field=where)


def _read_input(item: grpc_service_pb2.ModelInferRequest.InferInputTensor, raw: Buffer | None) -> Tensor:
    where = f"input {item.name!r}"
    if item.parameters:
        refuse_unserved_parameters(where, item.parameters)
    dtype = _DTYPES.get(item.datatype)
    if dtype is None:
        raise InvalidRequest(f"{where}: datatype {item.datatype[:32]!r} is not one of {', '.join(_DTYPES)}", field=where)
    if len(item.shape) > MAX_NUM_DIMENSIONS:
        raise InvalidRequest(f"{where}: has {len(item.shape)} dimensions", field=where)
    shape = tuple(item.shape)
    # An empty message of contents is what some generated clients always send; it holds nothing that could be mixed in.
    has_contents = item.HasField("contents") and item.contents.ByteSize() > 0
    if raw is None:
        return Tensor(item.name, dtype, shape, _read_contents(item.contents, dtype, shape, where) if has_contents else b"")
    if has_contents:
        raise InvalidRequest(f"{where}: has contents, but the request also has raw_input_contents; use one of the two", field=where)
    return Tensor(item.name, dtype, shape, raw)


def _read_contents(
    contents: grpc_service_pb2.InferTensorContents, dtype: DataType, shape: tuple[int, ...], where: str
) -> bytes:
    """Typed elements as raw bytes. Raises InvalidRequest for the wrong list, the wrong number, or a value out of range."""
    typed = _TYPED.get(dtype)
    if typed is None:
        raise InvalidRequest(f"{where}: {dtype.name} has no typed contents; send it in raw_input_contents", field=where)
    for other, _ in contents.ListFields():
        if other.name != typed.field:
            raise InvalidRequest(f"{where}: {dtype.name} belongs in {typed.field}, got {other.name}", field=where)
    values = getattr(contents, typed.field)
    expected = num_elements(shape, where)
    if len(values) != expected:
        raise InvalidRequest(f"{where}: shape {list(shape)} has {expected} elements, {typed.field} has {len(values)}", field=where)
    return _encode(values, dtype, typed.code, where)


def _encode(values: Any, dtype: DataType, code: str, where: str) -> bytes:
    if dtype is DataType.BYTES:
        return encode_bytes(values)
    if dtype is DataType.BOOL:
        return bytes(values)
    try:
        elements = array(code, values)
    except OverflowError as error:
        raise InvalidRequest(f"{where}: a value does not fit {dtype.name}: {error}", field=where) from error
    if sys.byteorder == "big":
        elements.byteswap()
    return bytes(elements.tobytes())

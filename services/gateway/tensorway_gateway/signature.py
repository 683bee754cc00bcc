"""Checks a request against a revision's signature. Pure: built once per revision, then called for every request."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Final, NoReturn

from tensorway.errors import InvalidRequest
from tensorway.signature import ROWS, RevisionSpec, TensorSpec
from tensorway.tensors import ITEM_SIZE, MAX_NUM_ELEMENTS, DataType, Tensor, check_bytes_elements, check_num_bytes
from tensorway_gateway.requests import FieldPath, native_field

#: Most elements of one BYTES tensor: each prefix is read one by one, which must not hold up the loop.
MAX_BYTES_ELEMENTS: Final = 1 << 17


class SignatureCheck:
    """The checks of one revision. `rows` is the entry point."""

    __slots__ = ("_batching", "_inputs", "_is_batchable", "_model", "_outputs")

    def __init__(self, spec: RevisionSpec) -> None:
        self._model = spec.model
        self._inputs = {tensor.name: tensor for tensor in spec.signature.inputs}
        self._outputs = tuple(tensor.name for tensor in spec.signature.outputs)
        self._is_batchable = spec.signature.is_batchable
        self._batching = spec.batching

    def rows(self, inputs: Sequence[Tensor], output_names: Sequence[str], path: FieldPath = native_field) -> int:
        """Extent of the batch dimension; 1 where requests of this model are never joined.

        Raises InvalidRequest, naming the field by `path`, where a name is missing, unknown or given twice, or a dtype, rank, extent or
        byte length does not fit.
        """
        wanted = self._inputs
        # As many as wanted, none unknown, none missing: then none is given twice.
        if len(inputs) != len(wanted) or {tensor.name for tensor in inputs} != wanted.keys():
            self._refuse_names(inputs, path)
        extents: dict[str, int] = {}
        for index, tensor in enumerate(inputs):
            spec = wanted[tensor.name]
            if tensor.dtype is not spec.dtype:
                _refuse(path(index, tensor.name, "dtype"), f"model {self._model!r} takes {spec.dtype.name}, got {tensor.dtype.name}")
            self._bind(index, tensor, spec, extents, path)
            _check_content(index, tensor, path)
        if output_names:
            self._check_outputs(output_names)
        return self._rows(extents, inputs, path)

    def _bind(self, index: int, tensor: Tensor, spec: TensorSpec, extents: dict[str, int], path: FieldPath) -> None:
        """Compares one shape with its spec; a dimension's name gets the first extent it meets and keeps it."""
        shape = tensor.shape
        if len(shape) != len(spec.shape):
            _refuse(path(index, tensor.name, "shape"), f"needs {len(spec.shape)} dimensions {_show(spec)}, got {list(shape)}")
        for extent, dimension in zip(shape, spec.shape, strict=True):
            if isinstance(dimension, int):
                if extent != dimension:
                    _refuse(path(index, tensor.name, "shape"), f"must be {_show(spec)}, got {list(shape)}")
            elif not 0 <= extent <= MAX_NUM_ELEMENTS:
                _refuse(path(index, tensor.name, "shape"), f"{dimension} is {extent}, outside 0 to {MAX_NUM_ELEMENTS}")
            elif extents.setdefault(dimension, extent) != extent:
                _refuse(
                    path(index, tensor.name, "shape"),
                    f"{dimension} is {extent} here and {extents[dimension]} elsewhere in the request; they must be equal",
                )

    def _check_outputs(self, names: Sequence[str]) -> None:
        for index, name in enumerate(names):
            if name not in self._outputs:
                _refuse(f"output_names[{index}]", f"model {self._model!r} has no output {name!r}, only {', '.join(self._outputs)}")
            if name in names[:index]:
                _refuse(f"output_names[{index}]", f"output {name!r} is asked for twice")

    def _rows(self, extents: dict[str, int], inputs: Sequence[Tensor], path: FieldPath) -> int:
        if not self._is_batchable:
            return 1
        rows = extents[ROWS]
        if rows == 0:
            _refuse(path(0, inputs[0].name, "shape"), "rows is 0; a request needs at least one row")
        if rows > self._batching.max_rows and self._batching.oversize == "refuse":
            _refuse(
                path(0, inputs[0].name, "shape"),
                f"{rows} rows are more than the {self._batching.max_rows} that model {self._model!r} takes in one request; split it",
            )
        return rows

    def _refuse_names(self, inputs: Sequence[Tensor], path: FieldPath) -> NoReturn:
        given: set[str] = set()
        for index, tensor in enumerate(inputs):
            if tensor.name not in self._inputs:
                known = ", ".join(self._inputs)
                _refuse(path(index, tensor.name, "name"), f"model {self._model!r} has no input {tensor.name!r}, only {known}")
            if tensor.name in given:
                _refuse(path(index, tensor.name, "name"), f"input {tensor.name!r} is given twice")
            given.add(tensor.name)
        missing = ", ".join(repr(name) for name in self._inputs if name not in given)
        _refuse("inputs", f"model {self._model!r} also needs input {missing}")


def _check_content(index: int, tensor: Tensor, path: FieldPath) -> None:
    """The byte length, the prefixes of BYTES and the values of BOOL."""
    dtype, data = tensor.dtype, tensor.data
    count = prod(tensor.shape)
    if dtype is DataType.BYTES:
        where = path(index, tensor.name, "data")
        if count > MAX_BYTES_ELEMENTS:
            _refuse(where, f"{count} BYTES elements are more than {MAX_BYTES_ELEMENTS} in one tensor; split the request")
        check_bytes_elements(data, count, where)
    elif len(data) != count * ITEM_SIZE[dtype]:
        check_num_bytes(dtype, tensor.shape, data, path(index, tensor.name, "data"))
    elif dtype is DataType.BOOL and bytes(data).translate(None, b"\x00\x01"):
        _refuse(path(index, tensor.name, "data"), "a BOOL element must be 0x00 or 0x01")


def _show(spec: TensorSpec) -> str:
    return f"[{', '.join(map(str, spec.shape))}]"


def _refuse(field: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"{field}: {problem}", field=field)

"""What a step returned, checked against the signature and cut into each request's answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple, cast

import torch

from tensorway.errors import InvalidRequest, ModelFailed
from tensorway.model import Outputs, Parameter, Value
from tensorway.signature import Signature, TensorSpec
from tensorway.tensors import Buffer, DataType
from tensorway_worker.rank.batch import Prepared, Request, longest
from tensorway_worker.rank.layout import bind_extents
from tensorway_worker.rank.received import DATA_TYPE_OF, bytes_of

#: Name, dtype, shape and byte length of one output.
OutputHead = tuple[str, DataType, tuple[int, ...], int]


#: What postprocess may return beside tensors: it becomes a parameter of the response.
_PLAIN: Final = (bool, int, float, str)


class Answer(NamedTuple):
    """One request's outputs, in the order in which it wants them."""

    heads: tuple[OutputHead, ...]
    payload: tuple[Buffer, ...]
    #: Plain values that postprocess returned beside the outputs.
    parameters: Mapping[str, bool | int | float | str] = MappingProxyType({})


class OutputRules:
    """Cuts and checks outputs by one signature."""

    def __init__(self, signature: Signature) -> None:
        self._specs = {spec.name: spec for spec in signature.outputs}
        self._all = tuple(self._specs)
        self._is_batchable = signature.is_batchable

    def check_names(self, request: Request) -> None:
        """Raises InvalidRequest where the request wants an output that the model does not have."""
        for index, name in enumerate(request.output_names):
            if name not in self._specs:
                raise InvalidRequest(f"the model has no output {name!r}; it has {list(self._all)}", field=f"output_names[{index}]")

    def split(self, outputs: Outputs, step: Sequence[Prepared]) -> list[Answer]:
        """The answers of a step's requests, in its order. Raises ModelFailed naming the output that breaks the signature."""
        if not self._is_batchable:
            return [self.answer(outputs, item.request) for item in step]
        total = sum([item.rows for item in step])
        padded = longest(step)
        wanted = self._wanted(step)
        columns = {name: self._column(name, outputs, step, total, padded) for name in wanted}
        if len(wanted) == 1:
            return [Answer((head,), (data,)) for head, data in columns[wanted[0]]]
        return [_answer([columns[name][place] for name in item.request.output_names or self._all]) for place, item in enumerate(step)]

    def empty(self, request: Request) -> Answer | None:
        """The answer to a request without rows, which needs no step; None where only a step can tell the extents."""
        pieces: list[tuple[OutputHead, Buffer]] = []
        names = request.output_names or self._all
        for name in names:
            spec = self._specs[name]
            shape = [dimension if isinstance(dimension, int) else request.layout.extents.get(dimension, -1) for dimension in spec.shape]
            if shape[:1] != [0] or min(shape) < 0:
                return None
            pieces.append(((name, spec.dtype, tuple(shape), 0), b""))
        return _answer(pieces)

    def _wanted(self, step: Sequence[Prepared]) -> tuple[str, ...]:
        if all(item.request.output_names for item in step):
            return tuple(dict.fromkeys(name for item in step for name in item.request.output_names))
        return self._all

    def _column(
        self, name: str, outputs: Outputs, step: Sequence[Prepared], total: int, padded: dict[str, int]
    ) -> list[tuple[OutputHead, Buffer]]:
        """One output of every request of the step."""
        spec, value = self._specs[name], _checked(name, outputs, self._specs[name])
        shape = tuple(value.shape)
        if not shape or shape[0] != total:
            raise ModelFailed(f"output {name} has shape {list(shape)}, expected {total} rows along dimension 0")
        is_trimmed = _check_extents(spec, shape, padded, step)
        if spec.dtype is DataType.BYTES or is_trimmed:
            return [_piece(spec, part) for part in _slices(value, spec, step, is_trimmed)]
        data = memoryview(bytes_of(value))
        row_bytes = len(data) // total if total else 0
        heads: dict[int, OutputHead] = {}
        column: list[tuple[OutputHead, Buffer]] = []
        offset = 0
        for item in step:
            rows = item.rows
            end = offset + rows * row_bytes
            head = heads.get(rows)
            if head is None:
                head = heads[rows] = (name, spec.dtype, (rows, *shape[1:]), end - offset)
            column.append((head, data[offset:end]))
            offset = end
        return column

    def answer(self, outputs: Outputs, request: Request) -> Answer:
        """One request's outputs that belong to it alone (after postprocess, or of a model that takes no batches)."""
        names = request.output_names or self._all
        extents = dict(request.layout.extents)
        pieces: list[tuple[OutputHead, Buffer]] = []
        for name in names:
            spec = self._specs[name]
            value = _checked(name, outputs, spec)
            try:
                bind_extents(spec, tuple(value.shape), extents, f"output {name}")
            except InvalidRequest as error:
                raise ModelFailed(error.message) from error
            pieces.append(_piece(spec, value))
        returned = cast(dict[str, object], outputs)
        plain: dict[str, Parameter] = {name: value for name, value in returned.items() if isinstance(value, _PLAIN)}
        return _answer(pieces)._replace(parameters=plain) if plain else _answer(pieces)


def unchecked_answer(outputs: Outputs) -> Answer:
    """Outputs that no signature declares, as they are: what Explain returns."""
    pieces: list[tuple[OutputHead, Buffer]] = []
    for name, value in outputs.items():
        dtype = DATA_TYPE_OF[value.dtype] if isinstance(value, torch.Tensor) else DataType.BYTES
        pieces.append(_piece(TensorSpec(name, dtype, ()), value))
    return _answer(pieces)


def cut_rows(outputs: Outputs, step: Sequence[Prepared]) -> list[Outputs]:
    """Each request's rows of all outputs, as views: what postprocess gets. Raises ModelFailed where an output has other rows."""
    total = sum(item.rows for item in step)
    for name, value in outputs.items():
        if not value.ndim or value.shape[0] != total:
            raise ModelFailed(f"output {name} has shape {list(value.shape)}, expected {total} rows along dimension 0")
    cut: list[Outputs] = []
    offset = 0
    for item in step:
        cut.append({name: value[offset : offset + item.rows] for name, value in outputs.items()})
        offset += item.rows
    return cut


def to_host(outputs: Outputs) -> Outputs:
    """The outputs on the CPU; waits for the device. Raises ModelFailed where the model returned something else than named tensors."""
    if not isinstance(outputs, dict):
        raise ModelFailed(f"forward must return a dict of tensors by name, got a {type(outputs).__name__}")
    for name, value in outputs.items():
        if not hasattr(value, "ndim") or not hasattr(value, "shape"):
            raise ModelFailed(f"output {name} must be a tensor, got a {type(value).__name__}")
    if all(not isinstance(value, torch.Tensor) or value.device.type == "cpu" for value in outputs.values()):
        return outputs
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in outputs.items()}


def _answer(pieces: Sequence[tuple[OutputHead, Buffer]]) -> Answer:
    return Answer(tuple(piece[0] for piece in pieces), tuple(piece[1] for piece in pieces))


def _piece(spec: TensorSpec, value: Value) -> tuple[OutputHead, Buffer]:
    data = bytes_of(value)
    return (spec.name, spec.dtype, tuple(value.shape), len(data)), data


def _checked(name: str, outputs: Outputs, spec: TensorSpec) -> Value:
    value = outputs.get(name)
    if value is None:
        raise ModelFailed(f"the model did not return output {name}; it returned {list(outputs)}")
    actual = DATA_TYPE_OF.get(value.dtype) if isinstance(value, torch.Tensor) else DataType.BYTES
    if actual is not spec.dtype:
        got = actual.name if actual else str(value.dtype)
        raise ModelFailed(f"output {name} is declared {spec.dtype.name}, the model returned {got}")
    if isinstance(value, torch.Tensor) and value.layout is not torch.strided:
        raise ModelFailed(f"output {name} is a {value.layout} tensor; return a dense one")
    return value


def _check_extents(spec: TensorSpec, shape: tuple[int, ...], padded: dict[str, int], step: Sequence[Prepared]) -> bool:
    """Checks a joined output's extents behind the rows; says whether any request's share of it must be trimmed."""
    if len(shape) != len(spec.shape):
        raise ModelFailed(f"output {spec.name} has shape {list(shape)}, declared {list(spec.shape)}")
    is_trimmed = False
    for dimension, extent in zip(spec.shape[1:], shape[1:], strict=True):
        wanted = dimension if isinstance(dimension, int) else padded.get(dimension, extent)
        if wanted != extent:
            raise ModelFailed(f"output {spec.name} has shape {list(shape)}, declared {list(spec.shape)} with {dimension} = {wanted}")
        if isinstance(dimension, str) and dimension in padded:
            is_trimmed = is_trimmed or any(item.request.layout.extents[dimension] != extent for item in step)
    return is_trimmed


def _slices(value: Value, spec: TensorSpec, step: Sequence[Prepared], is_trimmed: bool) -> list[Value]:
    """Each request's rows, cut back to its own extents."""
    parts: list[Value] = []
    offset = 0
    for item in step:
        extents = item.request.layout.extents if is_trimmed else {}
        index = (
            slice(offset, offset + item.rows),
            *(slice(0, extents.get(dimension)) if isinstance(dimension, str) else slice(None) for dimension in spec.shape[1:]),
        )
        parts.append(value[index])
        offset += item.rows
    return parts

"""What a request's inputs look like, checked once for each combination of names, dtypes and shapes.

Callers repeat themselves: nearly all requests for a model share a handful of layouts, so the check is a dictionary look-up after the first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from tensorway.errors import InvalidRequest
from tensorway.signature import ROWS, Signature, TensorSpec
from tensorway.tensors import ITEM_SIZE, DataType, num_elements

#: Layouts kept; past this the cache starts afresh, so that a caller with ever new shapes cannot fill the memory.
_MAX_LAYOUTS: Final = 2048

#: Name, number of the dtype, shape and byte length of one input as the wire has it.
InputKey = tuple[str, int, tuple[int, ...], int]


@dataclass(frozen=True, slots=True)
class InputLayout:
    """One input of one layout."""

    name: str
    dtype: DataType
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All inputs of a request, in the order in which their bytes come."""

    inputs: tuple[InputLayout, ...]
    num_bytes: int
    #: Extent of dimension 0; 1 where the model's requests are never joined.
    rows: int
    #: Dimension name -> extent within the request.
    extents: dict[str, int]
    #: Requests with equal keys can be joined: every extent but the rows and those that padding can make equal.
    join_key: tuple[object, ...] = ()
    #: Whether any input is BYTES.
    has_bytes: bool = False
    #: Why a request of this layout must be refused; None where it fits the signature.
    error: InvalidRequest | None = None


class Layouts:
    """The layouts seen so far for one signature; `padded` names the inputs that padding can make equal."""

    def __init__(self, signature: Signature, padded: Collection[str]) -> None:
        self._padded = padded
        self._specs = {spec.name: spec for spec in signature.inputs}
        self._is_batchable = signature.is_batchable
        self._known: dict[tuple[InputKey, ...], Layout] = {}

    def of(self, key: tuple[InputKey, ...]) -> Layout:
        """The layout that `key` describes; `error` tells where it breaks the signature."""
        layout = self._known.get(key)
        if layout is None:
            if len(self._known) >= _MAX_LAYOUTS:
                self._known.clear()
            layout = self._known[key] = self._check(key)
        return layout

    def _check(self, key: Sequence[InputKey]) -> Layout:
        num_bytes = sum(item[3] for item in key)
        try:
            return self._fitting(key, num_bytes)
        except InvalidRequest as error:
            return Layout((), num_bytes, 0, {}, (), False, error)

    def _fitting(self, key: Sequence[InputKey], num_bytes: int) -> Layout:
        inputs: list[InputLayout] = []
        extents: dict[str, int] = {}
        for index, (name, dtype, shape, size) in enumerate(key):
            field = f"inputs[{index}]"
            spec = self._specs.get(name)
            if spec is None:
                raise InvalidRequest(f"{field}: the model has no input {name!r}; it takes {list(self._specs)}", field=f"{field}.name")
            if dtype != spec.dtype:
                raise InvalidRequest(f"{field}: {name} must be {spec.dtype.name}, got {_dtype_name(dtype)}", field=f"{field}.dtype")
            bind_extents(spec, shape, extents, field)
            _check_size(spec, shape, size, field)
            inputs.append(InputLayout(name, spec.dtype, shape, size))
        names = [item.name for item in inputs]
        if len(set(names)) != len(self._specs) or len(names) != len(self._specs):
            missing = [name for name in self._specs if name not in names]
            raise InvalidRequest(f"inputs: expected each of {list(self._specs)} once, missing {missing}", field="inputs")
        rows = extents.get(ROWS, 1) if self._is_batchable else 1
        join_key = sorted((item.name, item.shape[1:]) for item in inputs if item.name not in self._padded)
        has_bytes = any(item.dtype is DataType.BYTES for item in inputs)
        return Layout(tuple(inputs), num_bytes, rows, extents, tuple(join_key), has_bytes)


def bind_extents(spec: TensorSpec, shape: tuple[int, ...], extents: dict[str, int], field: str) -> None:
    """Adds the extents that `shape` gives to the spec's dimension names. Raises InvalidRequest where shape and spec disagree, or where a
    name already has another extent."""
    if len(shape) != len(spec.shape):
        raise InvalidRequest(
            f"{field}: {spec.name} must have {len(spec.shape)} dimensions {list(spec.shape)}, got shape {list(shape)}",
            field=f"{field}.shape",
        )
    for dimension, extent in zip(spec.shape, shape, strict=True):
        wanted = dimension if isinstance(dimension, int) else extents.setdefault(dimension, extent)
        if wanted != extent:
            label = f"{dimension} = {wanted}" if isinstance(dimension, str) else str(wanted)
            raise InvalidRequest(
                f"{field}: {spec.name} has shape {list(shape)}, expected {list(spec.shape)} with {label}", field=f"{field}.shape"
            )


def _check_size(spec: TensorSpec, shape: tuple[int, ...], num_bytes: int, field: str) -> None:
    count = num_elements(shape, field)
    if spec.dtype is DataType.BYTES:
        if num_bytes < 4 * count:
            raise InvalidRequest(f"{field}: {count} BYTES elements need at least {4 * count} bytes, got {num_bytes}", field=f"{field}.data")
        return
    expected = count * ITEM_SIZE[spec.dtype]
    if num_bytes != expected:
        raise InvalidRequest(
            f"{field}: {spec.dtype.name} of shape {list(shape)} needs {expected} bytes, got {num_bytes}", field=f"{field}.data"
        )


def _dtype_name(number: int) -> str:
    return DataType(number).name if number in DataType._value2member_map_ else str(number)

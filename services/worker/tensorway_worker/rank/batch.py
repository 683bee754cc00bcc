"""Requests of one batch, and how they become the inputs of one step.

    requests ──preprocess──▶ prepared ──group by join key──▶ steps ──join, pad──▶ one tensor per input, dimension 0 = rows

Usually a batch is one step. It is several where requests cannot share a tensor: a model that takes no batches, or lengths that no padding
rule makes equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy
import torch

from tensorway.errors import ModelFailed
from tensorway.model import Inputs, Parameters, Value
from tensorway.tensors import DataType
from tensorway.transport.port import Payload
from tensorway_worker.rank.explain import ExplainOrder
from tensorway_worker.rank.layout import Layout
from tensorway_worker.rank.received import TORCH_OF, flat_tensor, pinned_tensor, value_of


class Request(NamedTuple):
    """One request as a leader sees it: checked, its tensors still the received bytes.

    This and what else is made once per request are named tuples: a frozen dataclass takes three times as long to make.
    """

    request_id: str
    layout: Layout
    #: The bytes of each input of `layout`, in its order.
    data: tuple[Payload, ...]
    #: Outputs wanted, in order; empty for all.
    output_names: tuple[str, ...]
    parameters: Parameters
    #: On `time.monotonic()`.
    deadline_s: float
    #: Set: the request is to be explained, in a step of its own.
    explain: ExplainOrder | None = None

    def values(self) -> Inputs:
        """Its inputs as tensors. Raises InvalidRequest where BYTES content is malformed."""
        return {
            item.name: value_of(item.dtype, item.shape, pieces, item.name)
            for item, pieces in zip(self.layout.inputs, self.data, strict=True)
        }


class Prepared(NamedTuple):
    """A request ready to be joined."""

    #: Position in its batch.
    place: int
    request: Request
    #: What the model takes; None while that is just the received bytes.
    values: Inputs | None
    #: Extent of dimension 0 of `values`; preprocessing may have changed it.
    rows: int
    join_key: tuple[object, ...]


def as_received(place: int, request: Request) -> Prepared:
    """A request of a model without preprocessing. Its BYTES inputs are decoded here: what is malformed must fail this request alone."""
    layout = request.layout
    key = layout.join_key if request.explain is None else _alone(place)
    return Prepared(place, request, request.values() if layout.has_bytes else None, layout.rows, key)


def _alone(place: int) -> tuple[object, ...]:
    """A key that no other request of the batch has."""
    return ("alone", place)


def preprocessed(place: int, request: Request, values: Inputs, is_batchable: bool, padding: Mapping[str, float]) -> Prepared:
    """A request after the model's preprocess, which returned `values`. Raises ModelFailed where they have no common rows."""
    if not is_batchable:
        return Prepared(place, request, values, 1, ())
    rows = {tuple(value.shape[:1]) for value in values.values()}
    if len(rows) != 1 or () in rows:
        shapes = {name: list(value.shape) for name, value in values.items()}
        raise ModelFailed(f"preprocess must return tensors with the same extent of dimension 0, got {shapes}")
    key = sorted(
        (name, str(value.dtype), value.ndim if name in padding else tuple(value.shape[1:])) for name, value in values.items()
    )
    return Prepared(place, request, values, int(rows.pop()[0]), tuple(key) if request.explain is None else _alone(place))


def group(prepared: Sequence[Prepared], is_batchable: bool) -> list[list[Prepared]]:
    """The steps that a batch needs, each a list of requests that can be joined, in batch order."""
    if not is_batchable:
        return [[item] for item in prepared]
    first = prepared[0].join_key if prepared else ()
    if all(item.join_key is first for item in prepared):
        return [list(prepared)] if prepared else []
    steps: dict[tuple[object, ...], list[Prepared]] = {}
    for item in prepared:
        steps.setdefault(item.join_key, []).append(item)
    return list(steps.values())


def longest(prepared: Sequence[Prepared]) -> dict[str, int]:
    """The largest extent of each named dimension among the requests of one step: what padding makes of it."""
    first = prepared[0].request.layout
    if all(item.request.layout is first for item in prepared):
        return first.extents
    found: dict[str, int] = {}
    for item in prepared:
        for name, extent in item.request.layout.extents.items():
            found[name] = max(found.get(name, 0), extent)
    return found


def join(prepared: Sequence[Prepared], padding: Mapping[str, float], device: str) -> Inputs:
    """The inputs of one step, on `device`. Every element is copied at most once on the host, and not at all for a single request."""
    first = prepared[0]
    is_cuda = device != "cpu"
    if first.values is None and all(item.request.layout is first.request.layout for item in prepared):
        inputs = _join_received(prepared, is_cuda)
    elif len(prepared) == 1:
        inputs = dict(_values(first))
    else:
        columns = [_values(item) for item in prepared]
        inputs = {name: _join_values([column[name] for column in columns], padding.get(name)) for name in columns[0]}
    if not is_cuda:
        return inputs
    return {name: _on_device(value, device) for name, value in inputs.items()}


def _on_device(value: Value, device: str) -> Value:
    return value.to(device, non_blocking=value.is_pinned()) if isinstance(value, torch.Tensor) else value


def _values(item: Prepared) -> Inputs:
    return item.request.values() if item.values is None else item.values


def _join_received(prepared: Sequence[Prepared], is_cuda: bool) -> Inputs:
    """Requests of one layout are joined as bytes: row-major tensors that differ only in dimension 0 follow one another in memory."""
    layout = prepared[0].request.layout
    inputs: Inputs = {}
    for position, item in enumerate(layout.inputs):
        pieces = tuple([piece for one in prepared for piece in one.request.data[position]])
        num_bytes = item.num_bytes * len(prepared)
        shape = item.shape
        if len(prepared) > 1:
            shape = (item.shape[0] * len(prepared), *item.shape[1:])
        if is_cuda and num_bytes and item.dtype is not DataType.BOOL:
            inputs[item.name] = pinned_tensor(pieces, TORCH_OF[item.dtype], num_bytes).reshape(shape)
        elif len(prepared) == 1 or item.dtype is DataType.BOOL or not num_bytes:
            inputs[item.name] = value_of(item.dtype, shape, pieces, item.name)
        else:
            inputs[item.name] = flat_tensor(b"".join(pieces), TORCH_OF[item.dtype]).reshape(shape)
    return inputs


def _join_values(values: list[Value], pad: float | None) -> Value:
    first = values[0]
    if not isinstance(first, torch.Tensor):
        return numpy.concatenate([numpy.asarray(value, dtype=object) for value in values])
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if pad is None or all(tensor.shape[1:] == first.shape[1:] for tensor in tensors):
        return torch.cat(tensors)
    extents = [max(tensor.shape[axis] for tensor in tensors) for axis in range(1, first.ndim)]
    joined = first.new_full((sum(len(tensor) for tensor in tensors), *extents), pad)
    offset = 0
    for tensor in tensors:
        place = (slice(offset, offset + len(tensor)), *(slice(0, extent) for extent in tensor.shape[1:]))
        joined[place] = tensor
        offset += len(tensor)
    return joined

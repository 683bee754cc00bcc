"""`NodeService.AdaptModel` on the wire: orders, and the stream of what becomes of them. Needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from tensorway.errors import InvalidRequest
from tensorway.model_directory import MODEL_NAME
from tensorway.tensors import DataType, Tensor, check_num_bytes
from tensorway.v1 import node_pb2, tensor_pb2

ADAPT_MODEL: Final = "/tensorway.v1.NodeService/AdaptModel"
CROSS_ENTROPY: Final = "cross_entropy"
MSE: Final = "mse"
COSINE: Final = "cosine"
SGD: Final = "sgd"
ADAMW: Final = "adamw"
STARTING: Final = node_pb2.ADAPTATION_STATE_STARTING
TRAINING: Final = node_pb2.ADAPTATION_STATE_TRAINING
WRITING: Final = node_pb2.ADAPTATION_STATE_WRITING
_LOSSES: Final = {node_pb2.LOSS_CROSS_ENTROPY: CROSS_ENTROPY, node_pb2.LOSS_MSE: MSE, node_pb2.LOSS_COSINE: COSINE}
_OPTIMIZERS: Final = {node_pb2.OPTIMIZER_SGD: SGD, node_pb2.OPTIMIZER_ADAMW: ADAMW}
_MAX_STEPS: Final = 1_000_000
#: As many bits as torch's generators take without a sign.
_MAX_SEED: Final = 1 << 63


@dataclass(frozen=True, slots=True)
class AdaptOrder:
    """What a caller wants of an adaptation; see `tensorway.v1.AdaptModelRequest`."""

    model: str
    #: A prefix; empty for any.
    revision: str
    inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    loss: str
    optimizer: str
    learning_rate: float
    num_steps: int
    #: 0: the model's batching.max_rows.
    batch_rows: int
    seed: int
    #: Never empty.
    new_model: str
    only: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Number of examples."""
        return self.inputs[0].shape[0]


def read_order(message: bytes | None) -> AdaptOrder:
    """One AdaptModelRequest. Raises InvalidRequest naming the first field that makes no sense, whatever the model is."""
    try:
        found = node_pb2.AdaptModelRequest.FromString(message or b"")
    except DecodeError as error:
        raise InvalidRequest("the message is no AdaptModelRequest", field="request") from error
    _check(found.loss in _LOSSES, "loss", "must be CROSS_ENTROPY, MSE or COSINE")
    _check(found.optimizer in _OPTIMIZERS, "optimizer", "must be SGD or ADAMW")
    rate = found.learning_rate
    _check(math.isfinite(rate) and rate > 0, "learning_rate", f"must be above 0, got {rate}")
    _check(0 < found.num_steps <= _MAX_STEPS, "num_steps", f"must be from 1 to {_MAX_STEPS}, got {found.num_steps}")
    _check(found.seed < _MAX_SEED, "seed", f"must be below 2^63, got {found.seed}")
    new_model = found.new_model or found.model
    _check(re.fullmatch(MODEL_NAME, new_model) is not None, "new_model", f"{new_model[:128]!r} is no model name")
    inputs, targets = _tensors(found.inputs, "inputs"), _tensors(found.targets, "targets")
    rows = {tensor.shape[0] for tensor in (*inputs, *targets)}
    _check(len(rows) == 1, "inputs", f"inputs and targets must have equally many rows, got {sorted(rows)}")
    _check(rows != {0}, "inputs", "there must be one row at least")
    return AdaptOrder(
        found.model, found.revision, inputs, targets, _LOSSES[found.loss], _OPTIMIZERS[found.optimizer], rate, found.num_steps,
        found.batch_rows, found.seed, new_model, tuple(found.only),
    )


def _tensors(messages: Iterable[tensor_pb2.Tensor], field: str) -> tuple[Tensor, ...]:
    tensors: list[Tensor] = []
    for index, one in enumerate(messages):
        where = f"{field}[{index}]"
        _check(one.dtype in DataType._value2member_map_, f"{where}.dtype", f"{one.name} has no known data type")
        _check(len(one.shape) > 0, f"{where}.shape", f"{one.name} is a scalar; dimension 0 must be the rows")
        tensor = Tensor(one.name, DataType(one.dtype), tuple(one.shape), one.data)
        check_num_bytes(tensor.dtype, tensor.shape, tensor.data, where)
        tensors.append(tensor)
    names = [tensor.name for tensor in tensors]
    _check(bool(names), field, "there must be one tensor at least")
    _check(len(set(names)) == len(names), field, f"names must be unique, got {names}")
    return tuple(tensors)


def _check(is_so: bool, field: str, sentence: str) -> None:
    if not is_so:
        raise InvalidRequest(f"{field}: {sentence}", field=field)


def progress_message(
    state: node_pb2.AdaptationState, num_steps: int, step: int = 0, loss: float = 0.0, detail: str = ""
) -> bytes:
    """A message on the way."""
    return node_pb2.AdaptModelResponse(state=state, step=step, num_steps=num_steps, loss=loss, detail=detail).SerializeToString()


def done_message(model: str, revision: str, path: str, num_parameters: int, num_steps: int, loss: float) -> bytes:
    """The last message."""
    return node_pb2.AdaptModelResponse(
        state=node_pb2.ADAPTATION_STATE_DONE, step=num_steps, num_steps=num_steps, loss=loss,
        adapted=node_pb2.AdaptedModel(model=model, revision=revision, path=path, num_parameters=num_parameters),
    ).SerializeToString()

"""What the ranks of a group tell each other, as the head of a message; the tensors go beside it.

    step      n   run your stage on these tensors and pass the outcome on
    skip      n   an earlier stage failed: pass that on
    forward   n   like step, keeping what a backward pass needs; n + 1 is the backward pass
    backward  n   go back through what number n - 1 kept, with these derivatives
    attend    n   like forward, but answer the caller: torch.distributed.autograd keeps the graph
    begin     n   get ready to train: which parameters, which optimizer
    train     n   like forward, with the loss at the end; n + 1 is the way back, which adds to every rank's gradients
    return    n   go back through what train n - 1 kept, with these derivatives
    share     n   the gradient of a weight that both of us hold, for update n
    update    n   one step of every rank's optimizer
    save      n   write your trained weights
    result    n   to the leader: the outcome of number n
    failed    n   to the leader: why there will be none
    side          beside the steps, and not numbered: see `side_calls.py`

Numbers are the leader's; every rank runs all of them, in order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from tensorway.errors import CallerError, FailedPrecondition, InvalidRequest, ModelFailed, OutOfMemory, TensorwayError
from tensorway_worker.rank.gradient_port import Target

STEP: Final = "step"
SKIP: Final = "skip"
FORWARD: Final = "forward"
BACKWARD: Final = "backward"
ATTEND: Final = "attend"
BEGIN: Final = "begin"
TRAIN: Final = "train"
RETURN: Final = "return"
SHARE: Final = "share"
UPDATE: Final = "update"
SAVE: Final = "save"
RESULT: Final = "result"
FAILED: Final = "failed"
SIDE: Final = "side"

_ERRORS: Final[dict[str, type[TensorwayError]]] = {
    "invalid": InvalidRequest, "precondition": FailedPrecondition, "memory": OutOfMemory, "model": ModelFailed,
}


@dataclass(frozen=True, slots=True)
class Command:
    """One message. `names[i]` is the name of the i-th tensor."""

    kind: str
    number: int
    names: tuple[str, ...] = ()
    detail: Mapping[str, Any] = field(default_factory=dict)

    def to_head(self, epoch: int) -> str:
        """As text, stamped with the epoch."""
        return json.dumps((epoch, self.kind, self.number, self.names, self.detail))

    @classmethod
    def from_head(cls, head: str, epoch: int) -> Command:
        """Raises ValueError for a message of another epoch."""
        its_epoch, kind, number, names, detail = json.loads(head)
        if its_epoch != epoch:
            raise ValueError(f"a message of epoch {its_epoch} reached epoch {epoch}")
        return cls(kind, number, tuple(names), detail)


def failure_detail(error: TensorwayError, rank: int) -> dict[str, Any]:
    """What the leader is told of a failed stage."""
    kind = next((name for name, kind in _ERRORS.items() if isinstance(error, kind)), "model")
    return {"error": kind, "message": error.message, "field": error.field, "rank": rank}


def failure_of(detail: Mapping[str, Any]) -> TensorwayError:
    """The counterpart of `failure_detail`."""
    kind = _ERRORS[detail["error"]]
    if issubclass(kind, CallerError):
        return kind(detail["message"], field=detail["field"])
    return kind(f"{detail['message']} (rank {detail['rank']})")


def target_detail(target: Target) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """A target as text, and its tensor (one or none)."""
    index = None if target.index is None else list(target.index)
    tensors = {"weights": target.weights, "flat": target.flat}
    kind = next((name for name, tensor in tensors.items() if tensor is not None), "")
    return {"output": target.output, "index": index, "by": kind}, [tensor for tensor in tensors.values() if tensor is not None]


def target_of(detail: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> tuple[Target, list[torch.Tensor]]:
    """The counterpart: the target, and the tensors without its own (which comes last)."""
    rest = list(tensors)
    own = {detail["by"]: rest.pop()} if detail["by"] else {}
    index = None if detail["index"] is None else tuple(detail["index"])
    return Target(detail["output"], index, **own), rest

"""Losses of an adaptation, and the order in which it takes its examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.nn import functional

from tensorway.errors import InvalidRequest
from tensorway_worker.adaptation_wire import COSINE, CROSS_ENTROPY


def loss_of(kind: str, outputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sum over `targets` of the mean loss of the outputs of those names; a scalar.

    Raises InvalidRequest where there is no such output, or shapes and types do not fit the loss.
    """
    total: torch.Tensor | None = None
    for name, target in targets.items():
        output = outputs.get(name)
        if output is None:
            raise InvalidRequest(f"targets: the model's forward returns no {name!r}, only {', '.join(outputs)}", field="targets")
        if not output.is_floating_point():
            raise InvalidRequest(f"targets: {name} is {output.dtype}, which has no derivative", field="targets")
        # Half the digits of a mean over many elements would be lost in half precision.
        wide = output if output.dtype == torch.float64 else output.float()
        one = _one(kind, name, wide, target.to(output.device))
        total = one if total is None else total + one
    if total is None:
        raise InvalidRequest("targets: there must be one at least", field="targets")
    return total


def _one(kind: str, name: str, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if kind == CROSS_ENTROPY and not target.is_floating_point():
        if target.shape != output.shape[:-1]:
            raise _unfit(name, f"classes of shape {list(output.shape[:-1])}", target)
        classes = target.long()
        counted = classes[classes != -100]
        if counted.numel() and not (int(counted.min()) >= 0 and int(counted.max()) < output.shape[-1]):
            raise InvalidRequest(f"targets: classes of {name} must be from 0 to {output.shape[-1] - 1}, or -100", field="targets")
        return functional.cross_entropy(output.movedim(-1, 1), classes)
    if target.shape != output.shape or not target.is_floating_point():
        raise _unfit(name, f"floating-point numbers of shape {list(output.shape)}", target)
    target = target.to(output.dtype)
    if kind == CROSS_ENTROPY:
        return functional.cross_entropy(output.movedim(-1, 1), target.movedim(-1, 1))
    if kind == COSINE:
        return (1 - functional.cosine_similarity(output, target, dim=-1)).mean()
    return functional.mse_loss(output, target)


def _unfit(name: str, wanted: str, target: torch.Tensor) -> InvalidRequest:
    return InvalidRequest(f"targets: {name} must be {wanted} for this loss, got {target.dtype} of {list(target.shape)}", field="targets")


def row_batches(num_rows: int, batch_rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Row numbers of one step after another, without end: permutations of all rows, drawn with `seed`, one after the other, and taken
    `batch_rows` at a time (so a batch may hold the end of one and the beginning of the next). [batch_rows]"""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < batch_rows:
            waiting = torch.cat((waiting, torch.randperm(num_rows, generator=generator)))
        yield waiting[:batch_rows]
        waiting = waiting[batch_rows:]

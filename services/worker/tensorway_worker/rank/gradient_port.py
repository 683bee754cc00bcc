"""The port behind which derivatives of a group's outputs are taken: one adapter for a chain of vector-Jacobian products, one for
`torch.distributed.autograd`. What Explain returns is built on the one primitive below (`explain.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from tensorway.model import Inputs


@dataclass(frozen=True, slots=True)
class Target:
    """The scalar of each row that is differentiated: one element of an output, or a weighted sum of all."""

    output: str
    #: Index within a row of the output (without dimension 0). None: what follows decides, or the largest element of each row.
    index: tuple[int, ...] | None = None
    #: Shape of one row of the output; the score is the sum of output x weights.
    weights: torch.Tensor | None = None
    #: Flat index within a row of the output, for each row. [rows]
    flat: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Gradient:
    """d score / d value for every row."""

    #: What was differentiated with respect to: the input, or the output of its embedding. [rows, ...]
    value: torch.Tensor
    #: Same shape as `value`.
    gradient: torch.Tensor
    #: The target's value. [rows]
    score: torch.Tensor
    #: Flat index, within a row of the output, of the element chosen where the target named none. [rows]; else empty.
    chosen: torch.Tensor


class Differentiator(Protocol):
    """Takes derivatives across the ranks of a group. Called by the leader's thread that runs steps; concurrent calls never mix."""

    def gradient(self, inputs: Inputs, name: str, at: torch.Tensor | None, target: Target) -> Gradient:
        """d target / d input `name` (its embedding, where it is an integer input that has one).

        `at` replaces the value of the input or embedding, same shape; None takes it as it is. Raises InvalidRequest where `name` is
        neither a floating-point input nor embedded, or the target names no element of the outputs.
        """

"""The port behind which the ranks of one group are linked. PyTorch RPC is one adapter (`group.py`); it is in maintenance mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tensorway.errors import Unavailable
from tensorway.model import Inputs, Outputs
from tensorway_worker.rank.gradient_port import Differentiator

#: Runs one step of the whole group.
StepRunner = Callable[[Inputs], Outputs]


class GroupLost(Unavailable):
    """A rank of this group is gone or out of step: the group must be formed anew, with a new epoch."""

    reason = Unavailable.reason


class RankGroup(Protocol):
    """This rank's membership in its group."""

    #: Steps of the leader that may be in flight at once, each in a thread of its own; 0: steps run in the torch thread itself.
    num_conductors: int

    def run(self, inputs: Inputs) -> Outputs:
        """The leader's: one step of all ranks, and its outputs. Raises GroupLost where a rank was lost, or what the model raised."""

    def differentiator(self, name: str) -> Differentiator:
        """The leader's: `vjp` or `dist_autograd`; empty for what fits. Raises FailedPrecondition for one that this group cannot offer."""

    def leave(self) -> None:
        """Lets go at once, without waiting for the others."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

"""The port behind which the ranks of one group are linked. PyTorch RPC is one adapter (`group.py`); it is in maintenance mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tensorway.errors import Unavailable
from tensorway.model import Inputs, Outputs

#: Runs one step of the whole group in this rank's torch thread.
StepRunner = Callable[[Inputs], Outputs]


class GroupLost(Unavailable):
    """A rank of this group is gone or out of step: the group must be formed anew, with a new epoch."""

    reason = Unavailable.reason


class RankGroup(Protocol):
    """This rank's membership in its group. All methods are called in the rank's torch thread."""

    def join(self) -> None:
        """Meets the other ranks. Raises GroupLost where they do not come."""

    def run(self, inputs: Inputs) -> Outputs:
        """The leader's: has every rank run the step, and returns its own outputs. Raises GroupLost where a rank failed to."""

    def leave(self) -> None:
        """Lets go at once, without waiting for the others."""

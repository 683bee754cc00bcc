"""The ranks of an epoch as their supervisor sees them, wherever they run: blocks of consecutive ranks, one block a node."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Protocol

from tensorway_worker.meeting import Answer
from tensorway_worker.rank.launch import RankStatus


class BlockLost(Exception):
    """A block's node cannot be reached any more, or gave its ranks up; the text says why."""


@dataclass(frozen=True, slots=True)
class StartedRank:
    """A rank process that has been started."""

    rank: int
    #: On its node.
    pid: int
    #: `cpu`, `cuda:N`, or several of these joined by commas, as its node numbers them.
    device: str


class RankEvents(Protocol):
    """Whom a block tells what its ranks do. Called in the loop; must not block."""

    def on_status(self, rank: int, status: RankStatus) -> None: ...

    def on_output(self, rank: int, line: str) -> None:
        """A line that the rank has printed."""

    def on_operation(self, rank: int, line: bytes, answer: Answer) -> None:
        """An operation on the epoch's store; `answer` may be called at any time until the block is stopped."""

    def on_exit(self, rank: int, code: int) -> None:
        """The process has ended and been reaped; `code` is its exit status, negative for a signal. Nothing of this rank follows."""


class Block(Protocol):
    """Consecutive ranks of one epoch that run on one node. `start`, then `run`; `stop` in any case."""

    @property
    def node(self) -> str: ...

    @property
    def ranks(self) -> range: ...

    async def start(self) -> tuple[StartedRank, ...]:
        """Starts the processes. Raises BlockLost where they cannot be started."""

    async def run(self, events: RankEvents) -> None:
        """Passes on what the ranks do, until all have ended. Raises BlockLost where their node is lost."""

    async def stop(self, grace_s: float) -> None:
        """Ends the ranks: SIGTERM, then SIGKILL after `grace_s` seconds; at once where that is 0. The leader, where it is here, ends
        before the others, for what it has accepted needs them. Returns when all have been reaped, or their node has been given up."""


def exit_words(code: int) -> str:
    """How a process ended: `was killed by SIGKILL`, `exited with status 1`."""
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def name_of(rank: int, node: str) -> str:
    """How a rank is named to people."""
    return f"rank {rank} on {node}"

"""What the leader waits for: the outcomes of numbered commands, given by other threads and other ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

import torch

from tensorway.errors import TensorwayError
from tensorway_worker.rank.group_port import GroupLost

#: How long the other shards of a stage may take to fail too. One that failed alone leaves them waiting for its sums for ever.
SETTLE_S: Final = 2.0

Named = dict[str, torch.Tensor]


@dataclass(slots=True)
class _Waiting:
    outcome: Future[Named]
    #: Ranks that failed, by stage.
    failed: dict[int, set[int]] = field(default_factory=dict)
    error: TensorwayError | None = None
    timer: threading.Timer | None = None


class Pending:
    """Commands without an outcome yet. Thread-safe."""

    def __init__(self, num_shards: int, on_lost: Callable[[GroupLost], None]) -> None:
        self._num_shards = num_shards
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._next = 0
        self._waiting: dict[int, _Waiting] = {}
        self._lost: GroupLost | None = None

    def begin(self, count: int = 1) -> tuple[int, list[Future[Named]]]:
        """Takes the next `count` numbers; returns the first, and a future for each. Raises GroupLost once the group is lost."""
        with self._lock:
            if self._lost is not None:
                raise GroupLost(self._lost.message)
            first, self._next = self._next, self._next + count
            outcomes: list[Future[Named]] = [Future() for _ in range(count)]
            for offset, outcome in enumerate(outcomes):
                self._waiting[first + offset] = _Waiting(outcome)
            return first, outcomes

    def resolve(self, number: int, outcome: Named) -> None:
        """The outcome of `number`; one that failed before stays failed."""
        with self._lock:
            waiting = self._waiting.pop(number, None)
        if waiting is not None:
            _end(waiting, outcome)

    def fail(self, number: int, stage: int, rank: int, error: TensorwayError) -> None:
        """`rank` failed at `number`. The outcome is out once all shards of its stage have failed; where they do not, the group is lost."""
        with self._lock:
            waiting = self._waiting.get(number)
            if waiting is None:
                return
            waiting.error = waiting.error or error
            ranks = waiting.failed.setdefault(stage, set())
            ranks.add(rank)
            has_settled = len(ranks) == self._num_shards
            if has_settled:
                del self._waiting[number]
            elif waiting.timer is None:
                lost = GroupLost(f"rank {rank} failed while the other shards of its stage did not: {error.message}")
                waiting.timer = threading.Timer(SETTLE_S, self._on_lost, (lost,))
                waiting.timer.daemon = True
                waiting.timer.start()
        if has_settled:
            _end(waiting, {})

    def drop(self, number: int) -> None:
        """Nobody waits for `number` any more."""
        with self._lock:
            self._waiting.pop(number, None)

    def lose(self, lost: GroupLost) -> None:
        """Fails everything, now and from now on."""
        with self._lock:
            self._lost = self._lost or lost
            waiting, self._waiting = list(self._waiting.values()), {}
        for one in waiting:
            one.error = lost
            _end(one, {})


def _end(waiting: _Waiting, outcome: Named) -> None:
    if waiting.timer is not None:
        waiting.timer.cancel()
    if waiting.error is not None:
        waiting.outcome.set_exception(waiting.error)
    else:
        waiting.outcome.set_result(outcome)

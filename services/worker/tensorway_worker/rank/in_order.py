"""Commands in the order of their numbers, whatever order they arrive in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from tensorway_worker.rank.executor import Work

#: Commands that may wait for an earlier one; far more than can be in flight.
_MAX_WAITING: Final = 10_000


class InOrder:
    """Passes work on to `enqueue` by number: 0 first, without gaps, from `open` on. `put` may be called from any thread.

    All ranks of a group run the same commands in the same order, or their collectives would meet the wrong partners; RPC's threads keep
    no order.
    """

    def __init__(self, enqueue: Callable[[Work], None]) -> None:
        self._enqueue = enqueue
        self._lock = threading.Lock()
        self._next = 0
        self._is_open = False
        self._waiting: dict[int, Work] = {}

    def open(self) -> None:
        """Lets work through, what has come so far first: a rank's first command may come before its model is loaded."""
        with self._lock:
            self._is_open = True
            self._pass_on()

    def put(self, number: int, work: Work) -> None:
        """Raises ValueError for a number that has come before, or a gap that no group can have."""
        with self._lock:
            if number < self._next or number in self._waiting or len(self._waiting) >= _MAX_WAITING:
                raise ValueError(f"command {number} came where {self._next} was expected")
            self._waiting[number] = work
            if self._is_open:
                self._pass_on()

    def _pass_on(self) -> None:
        while (due := self._waiting.pop(self._next, None)) is not None:
            self._next += 1
            self._enqueue(due)

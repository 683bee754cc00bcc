"""The choices of one revision that wait for a place on a group. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from tensorway_orchestrator.streams import Choice


@dataclass(slots=True)
class ChoiceQueue:
    """By priority, then those that a client is in the middle of, then deadline, then arrival."""

    num_waiting: int = 0
    _heap: list[tuple[int, bool, float, int, Choice]] = field(default_factory=list)
    _tickets: Iterator[int] = field(default_factory=lambda: count(1))

    def offer(self, choice: Choice) -> None:
        """Adds a choice that does not wait here yet."""
        choice.ticket = next(self._tickets)
        stream = choice.stream
        heapq.heappush(self._heap, (-stream.generation.priority, not stream.has_begun, stream.deadline_s, choice.ticket, choice))
        self.num_waiting += 1

    def withdraw(self, choice: Choice) -> None:
        """Takes a choice out, if it waits; it is dropped from the heap when met."""
        if choice.ticket:
            choice.ticket = 0
            self.num_waiting -= 1

    def peek(self) -> Choice | None:
        """The most urgent one, left where it is."""
        heap = self._heap
        while heap and heap[0][4].ticket != heap[0][3]:
            heapq.heappop(heap)
        return heap[0][4] if heap else None

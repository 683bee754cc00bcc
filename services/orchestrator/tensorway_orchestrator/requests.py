"""Requests that wait: the unit of admission, and the queue of one revision. Pure: takes `now_s`, touches nothing."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from tensorway.transport.port import Exchange, Payload

#: Requests that do not fit into a batch are passed over, at most this many, before the batch is closed as it is.
_MAX_PASSED_OVER: Final = 16


@dataclass(slots=True, eq=False)
class Request:
    """One client call, from its arrival here to its answer."""

    request_id: str
    rows: int
    num_bytes: int
    priority: int
    #: On the monotonic clock.
    deadline_s: float
    #: Extents that must be equal within a batch; see `batching.shape_key`.
    shape_key: tuple[int, ...]
    #: The serialised RequestHead, passed on as it came.
    head: bytes
    payload: Payload
    arrived_s: float
    #: Who is to be answered.
    origin: Exchange
    #: Comes alone, and its time says nothing about that of a step.
    is_explanation: bool = False
    num_attempts: int = 0
    #: Groups that were lost with this request on them.
    lost_groups: tuple[str, ...] = ()
    #: False once answered or withdrawn; a closed request is dropped wherever it is met.
    is_open: bool = True
    #: When the queue time of the last attempt ended.
    sent_s: float = 0.0
    #: Called when the request is closed.
    on_close: Callable[[], None] | None = None
    #: Set while a group has it: called after it was closed before its answer came.
    on_abandon: Callable[[], None] | None = None

    @property
    def weight(self) -> int:
        """Rows as the limits count them: an empty request still takes a place."""
        return max(1, self.rows)


@dataclass(slots=True)
class RequestQueue:
    """The waiting requests of one revision, by priority then deadline, apart by shape key."""

    num_rows: int = 0
    num_requests: int = 0
    _heaps: dict[tuple[int, ...], list[tuple[int, float, int, Request]]] = field(default_factory=dict)
    _order: Iterator[int] = field(default_factory=count)

    def offer(self, request: Request) -> None:
        heap = self._heaps.setdefault(request.shape_key, [])
        heapq.heappush(heap, (-request.priority, request.deadline_s, next(self._order), request))
        self.num_rows += request.weight
        self.num_requests += 1

    def withdraw(self, request: Request) -> None:
        """Counts a request out that was closed while it waited; it is dropped from the heap when met."""
        self.num_rows -= request.weight
        self.num_requests -= 1

    def take(self, max_rows: int, max_bytes: int, max_requests: int) -> list[Request]:
        """The next batch: the most urgent request and those it may be joined with, at least one where any waits.

        A request larger than `max_rows` or `max_bytes` comes alone.
        """
        heap = self._most_urgent_heap()
        taken: list[Request] = []
        passed_over: list[tuple[int, float, int, Request]] = []
        rows = num_bytes = 0
        while heap and len(taken) < max_requests and rows < max_rows and len(passed_over) < _MAX_PASSED_OVER:
            entry = heapq.heappop(heap)
            request = entry[3]
            if not request.is_open:
                continue
            if taken and (rows + request.weight > max_rows or num_bytes + request.num_bytes > max_bytes):
                passed_over.append(entry)
                continue
            taken.append(request)
            rows += request.weight
            num_bytes += request.num_bytes
            self.withdraw(request)
        for entry in passed_over:
            heapq.heappush(heap, entry)
        return taken

    def peek(self) -> Request | None:
        """The most urgent request, left where it is."""
        heap = self._most_urgent_heap()
        return heap[0][3] if heap else None

    def drain(self) -> list[Request]:
        """Every open request, leaving the queue empty."""
        found = [entry[3] for heap in self._heaps.values() for entry in sorted(heap, key=lambda e: e[:3]) if entry[3].is_open]
        self._heaps.clear()
        self.num_rows = self.num_requests = 0
        return found

    def _most_urgent_heap(self) -> list[tuple[int, float, int, Request]]:
        """The heap whose first open request is the most urgent; closed requests and empty heaps are dropped on the way."""
        best: list[tuple[int, float, int, Request]] = []
        for key, heap in tuple(self._heaps.items()):
            while heap and not heap[0][3].is_open:
                heapq.heappop(heap)
            if not heap:
                del self._heaps[key]
            elif not best or heap[0] < best[0]:
                best = heap
        return best

"""Requests that wait: the unit of admission, and the queue of one revision. Pure: takes `now_s`, touches nothing."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Final, Protocol

from tensorway.errors import InternalError
from tensorway.transport.port import Exchange, Payload
from tensorway_orchestrator.quarantine import Death

if TYPE_CHECKING:
    from tensorway_orchestrator.outlook import Promise
    from tensorway_orchestrator.request_trace import RequestTrace

#: Requests that do not fit into a batch are passed over, at most this many, before the batch is closed as it is.
_MAX_PASSED_OVER: Final = 16


class Carrier(Protocol):
    """A batch that a group has been sent, as the requests in it see it."""

    def left(self) -> None:
        """A request in it was closed before the group answered."""


#: What must be equal within a batch: the shapes, the groups to avoid, and a number of its own for a request that must go alone.
BatchKey = tuple[tuple[int, ...], tuple[str, ...], int]


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
    #: None where it is not sampled.
    trace: RequestTrace | None = None
    #: Attempts of all kinds, and how many of them were hedges.
    num_attempts: int = 0
    num_hedges: int = 0
    #: Attempts that came to nothing.
    num_lost: int = 0
    #: Groups that did not answer it, or not in time.
    lost_groups: tuple[str, ...] = ()
    #: Those of them that died with it.
    died_on: tuple[str, ...] = ()
    #: The last of these deaths.
    death: Death | None = None
    #: Not 0: it goes alone, because a group died with it.
    alone: int = 0
    #: What was predicted for it on its arrival; None where nothing was.
    promise: Promise | None = None
    #: False once answered or withdrawn; a closed request is dropped wherever it is met.
    is_open: bool = True
    #: Which of the queue's entries is its own; -1 while it does not wait. It may be with a group at the same time.
    ticket: int = -1
    #: The batches that it is in.
    carriers: list[Carrier] = field(default_factory=list)
    #: Called when the request is closed.
    on_close: Callable[[], None] | None = None

    @property
    def weight(self) -> int:
        """Rows as the limits count them: an empty request still takes a place."""
        return max(1, self.rows)

    @property
    def is_queued(self) -> bool:
        """Whether it waits in the queue."""
        return self.ticket >= 0

    @property
    def batch_key(self) -> BatchKey:
        """Requests of equal keys may share a batch."""
        return self.shape_key, self.lost_groups, self.alone


_Entry = tuple[int, float, int, Request]


@dataclass(slots=True)
class RequestQueue:
    """The waiting requests of one revision, by priority then deadline, apart by batch key."""

    num_rows: int = 0
    num_requests: int = 0
    _heaps: dict[BatchKey, list[_Entry]] = field(default_factory=dict)
    #: Rows by priority.
    _rows: dict[int, int] = field(default_factory=dict)
    _order: Iterator[int] = field(default_factory=count)

    def offer(self, request: Request) -> None:
        """Raises InternalError for one that waits already: `refile` it."""
        if request.is_queued:
            raise InternalError(f"request {request.request_id!r} is queued twice")
        request.ticket = next(self._order)
        heap = self._heaps.setdefault(request.batch_key, [])
        heapq.heappush(heap, (-request.priority, request.deadline_s, request.ticket, request))
        self.num_rows += request.weight
        self.num_requests += 1
        self._rows[request.priority] = self._rows.get(request.priority, 0) + request.weight

    def withdraw(self, request: Request) -> None:
        """Counts a request out that was closed while it waited, or leaves; its entry is dropped from the heap when met."""
        request.ticket = -1
        self.num_rows -= request.weight
        self.num_requests -= 1
        left = self._rows[request.priority] - request.weight
        if left:
            self._rows[request.priority] = left
        else:
            del self._rows[request.priority]

    def refile(self, request: Request) -> None:
        """To be called when the batch key of a request has changed while it waits; harmless for one that does not wait."""
        if request.is_queued:
            self.withdraw(request)
            self.offer(request)

    def rows_ahead(self, priority: int) -> int:
        """Rows that leave before a request of `priority` that comes now, where deadlines do not say otherwise."""
        return sum(rows for level, rows in self._rows.items() if level >= priority)

    def take(self, head: Request, max_rows: int, max_bytes: int, max_requests: int) -> list[Request]:
        """The batch that `head` (see `heads`) leads: the most urgent requests that it may be joined with.

        A request larger than `max_rows` or `max_bytes` comes alone.
        """
        heap = self._heaps.get(head.batch_key, [])
        taken: list[Request] = []
        passed_over: list[_Entry] = []
        rows = num_bytes = 0
        while heap and len(taken) < max_requests and rows < max_rows and len(passed_over) < _MAX_PASSED_OVER:
            entry = heapq.heappop(heap)
            request = entry[3]
            if not _is_live(entry):
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
        best: _Entry | None = None
        for heap in self._live_heaps():
            if best is None or heap[0] < best:
                best = heap[0]
        return None if best is None else best[3]

    def heads(self) -> list[Request]:
        """The most urgent request of each batch key, the most urgent first."""
        return [entry[3] for entry in sorted((heap[0] for heap in self._live_heaps()), key=lambda entry: entry[:3])]

    def drain(self) -> list[Request]:
        """Every open request, leaving the queue empty."""
        found = [entry[3] for heap in self._heaps.values() for entry in sorted(heap, key=lambda e: e[:3]) if _is_live(entry)]
        for request in found:
            self.withdraw(request)
        self._heaps.clear()
        return found

    def _live_heaps(self) -> list[list[_Entry]]:
        """The heaps that hold an open request, which is then their first; closed requests and empty heaps are dropped on the way."""
        for key, heap in tuple(self._heaps.items()):
            while heap and not _is_live(heap[0]):
                heapq.heappop(heap)
            if not heap:
                del self._heaps[key]
        return list(self._heaps.values())


def _is_live(entry: _Entry) -> bool:
    """False for what is left of a request that was closed, or filed anew, while it waited."""
    return entry[3].is_open and entry[3].ticket == entry[2]

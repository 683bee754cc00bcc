"""Open-loop overload, simulated: what is answered in time when three times as much comes as the groups can serve.

The queue, the batching, the prediction and the routing are the orchestrator's own; only time, groups and callers are simulated.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from benchmarks.sim_routers import picker
from tensorway.errors import TensorwayError
from tensorway.transport.port import Payload
from tensorway_orchestrator.batching import BatchLimits, Burst, Waiting, leave_at_s
from tensorway_orchestrator.boarding import board
from tensorway_orchestrator.group_record import GroupRecord, SentBatch
from tensorway_orchestrator.outlook import Outlook, Promise
from tensorway_orchestrator.requests import Request, RequestQueue
from tensorway_orchestrator.roster import Roster

NOISE: Final = 0.1
#: Way to a group and back, seconds.
WAY_S: Final = 0.001
HIGH_SHARE: Final = 0.2
#: Not counted: the time in which step times are learned, in full steps.
WARM_STEPS: Final = 70.0
HIGH: Final = 1


@dataclass(frozen=True, slots=True)
class Scene:
    """What is overloaded. Each request has one row."""

    num_groups: int
    max_rows: int
    fixed_s: float
    per_row_s: float
    #: Deadlines, evenly between these, in full steps of the quickest groups.
    deadline_steps: tuple[float, float]

    @property
    def full_step_s(self) -> float:
        return self.fixed_s + self.per_row_s * self.max_rows

    @property
    def limits(self) -> BatchLimits:
        return BatchLimits(self.max_rows, max_bytes=1 << 30, max_requests=self.max_rows, max_delay_s=0.0)


#: Full batches serve 4.5 times what single rows do.
MANY: Final = Scene(16, 16, fixed_s=0.010, per_row_s=0.002, deadline_steps=(4.0, 8.0))
#: Rows cost their time in any batch, and a full one takes two thirds of the time that there is.
ONE: Final = Scene(1, 32, fixed_s=0.010, per_row_s=0.060, deadline_steps=(1.55, 1.55))


class Nobody:
    """A caller that is not told. Implements `tensorway.transport.port.Exchange`."""

    head = b""
    payload: Payload = b""

    def reply(self, head: bytes, payload: Payload) -> None:
        raise AssertionError("answers are counted, not sent")

    def fail(self, error: TensorwayError) -> None:
        raise AssertionError("refusals are counted, not sent")

    def on_cancel(self, callback: Callable[[], None]) -> None:
        raise AssertionError("nobody cancels")


@dataclass(slots=True)
class Tally:
    """Requests of one priority, of those that arrived after the warm-up."""

    offered: int = 0
    refused: int = 0
    in_time: int = 0
    #: Admitted, and expired in the queue: they cost nothing but the caller's patience.
    expired: int = 0
    #: Admitted, run, and answered too late: wasted.
    late: int = 0


@dataclass(slots=True, eq=False)
class SimGroup:
    """A leader with its line."""

    record: GroupRecord
    speed: float
    line: list[tuple[SentBatch, list[Request], float]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Overload:
    """One run. `load` is a multiple of what the groups serve in full batches."""

    scene: Scene
    load: float
    #: Counted, after the warm-up.
    counted_s: float
    random: random.Random
    is_admission_on: bool = True
    tallies: dict[int, Tally] = field(default_factory=lambda: {0: Tally(), HIGH: Tally()})
    now_s: float = 0.0
    groups: list[SimGroup] = field(default_factory=list)
    queue: RequestQueue = field(default_factory=RequestQueue)
    burst: Burst = field(default_factory=Burst)
    roster: Roster = field(init=False)
    outlook: Outlook = field(init=False)
    promises: dict[Request, Promise] = field(default_factory=dict)
    num_good: int = 0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: count[int] = field(default_factory=count)
    _leave: int = 0

    def __post_init__(self) -> None:
        self.roster = Roster(max_rows=self.scene.max_rows, pick=picker(self.random))
        self.outlook = Outlook(self.roster)
        for index in range(self.scene.num_groups):
            record = self.roster.join(str(index), has_history=True)
            self.roster.opened(record, 0.0)
            self.groups.append(SimGroup(record, self.random.uniform(1.0, 2.0)))

    @property
    def warm_s(self) -> float:
        """When counting begins."""
        return WARM_STEPS * self.scene.full_step_s

    @property
    def capacity(self) -> float:
        """Rows a second in full batches."""
        return sum(self.scene.max_rows / (self.scene.full_step_s * group.speed) for group in self.groups)

    def goodput(self) -> float:
        """Requests answered in time after the warm-up, and before arrivals ended, as a share of the capacity."""
        return self.num_good / (self.capacity * self.counted_s)

    def run(self) -> None:
        """All of it."""
        self._at(0.0, self._arrive)
        while self._events:
            self.now_s, _, event = heapq.heappop(self._events)
            event()

    def _at(self, instant_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (instant_s, next(self._order), event))

    def _tally(self, request: Request) -> Tally:
        return self.tallies[request.priority] if request.arrived_s >= self.warm_s else Tally()

    def _arrive(self) -> None:
        now_s = self.now_s
        # The step times are learned at moderate load.
        rate = self.capacity * (self.load if now_s >= self.warm_s / 2 else min(self.load, 0.7))
        if now_s < self.warm_s + self.counted_s:
            self._at(now_s + self.random.expovariate(rate), self._arrive)
        deadline_s = now_s + self.random.uniform(*self.scene.deadline_steps) * self.scene.full_step_s
        priority = HIGH if self.random.random() < HIGH_SHARE else 0
        request = Request("", 1, 4096, priority, deadline_s, (), b"", b"", now_s, Nobody())
        self._tally(request).offered += 1
        if self.is_admission_on and self._is_doomed(request):
            self._tally(request).refused += 1
            return
        self.outlook.admitted(priority, 1, now_s)
        self._at(deadline_s, lambda: self._expire(request))
        self.queue.offer(request)
        self.burst.arrived(1, now_s)
        self._pump()

    def _is_doomed(self, request: Request) -> bool:
        promise = self.outlook.promise(self.queue.rows_ahead(request.priority), request.rows, request.priority, self.now_s)
        is_doomed = promise is not None and bool(self.queue.num_rows) and promise.finish_s > request.deadline_s
        if promise is not None and not is_doomed:
            self.promises[request] = promise
        return is_doomed

    def _pump(self) -> None:
        """As a lane does."""
        self._leave += 1
        while (head := self.queue.peek()) is not None:
            now_s = self.now_s
            record = self.roster.choose(min(self.queue.num_rows, self.scene.max_rows), (), now_s)
            if record is None:
                return
            waiting = Waiting(self.queue.num_rows, head.arrived_s, head.deadline_s)
            leave_s = leave_at_s(self.scene.limits, waiting, record.load(), self.burst, now_s)
            if leave_s == float("inf"):
                return
            if leave_s > now_s + 0.0002:
                self._at(leave_s, self._pump_if_due(self._leave))
                return
            self._send(record, self._take(record, head))

    def _take(self, record: GroupRecord, head: Request) -> list[Request]:
        boarding = board(self.queue, head, record, self.scene.limits, self.now_s)
        for request in boarding.doomed:
            self._miss(request, is_late=False)
        return boarding.taken

    def _pump_if_due(self, leave: int) -> Callable[[], None]:
        return lambda: self._pump() if leave == self._leave else None

    def _send(self, record: GroupRecord, requests: list[Request]) -> None:
        group = self.groups[int(record.id)]
        batch = self.roster.began(record, len(requests), self.now_s)
        self._at(self.now_s + WAY_S / 2, lambda: self._reach(group, batch, requests))

    def _reach(self, group: SimGroup, batch: SentBatch, requests: list[Request]) -> None:
        group.line.append((batch, requests, self.now_s))
        if len(group.line) == 1:
            self._step(group)

    def _step(self, group: SimGroup) -> None:
        batch, _, reached_s = group.line[0]
        step_s = (self.scene.fixed_s + self.scene.per_row_s * batch.rows) * group.speed * self.random.lognormvariate(0.0, NOISE)
        wait_s = self.now_s - reached_s
        self._at(self.now_s + step_s, lambda: self._end_step(group, step_s, wait_s))

    def _end_step(self, group: SimGroup, step_s: float, wait_s: float) -> None:
        batch, requests, _ = group.line.pop(0)
        self._at(self.now_s + WAY_S / 2, lambda: self._answer(batch, requests, step_s, wait_s))
        if group.line:
            self._step(group)

    def _answer(self, batch: SentBatch, requests: list[Request], step_s: float, wait_s: float) -> None:
        self.roster.ended(batch, self.now_s)
        self.roster.observed(batch, step_s, wait_s, self.now_s)
        for request in requests:
            if request.is_open:
                request.is_open = False
                self._tally(request).in_time += 1
                self.num_good += self.warm_s <= self.now_s < self.warm_s + self.counted_s
                if (promise := self.promises.pop(request, None)) is not None:
                    self.outlook.answered(promise, self.now_s)
        self._pump()

    def _expire(self, request: Request) -> None:
        if request.is_open:
            if request.is_queued:
                self.queue.withdraw(request)
                self._miss(request, is_late=False)
            else:
                self._miss(request, is_late=True)

    def _miss(self, request: Request, *, is_late: bool) -> None:
        """It is not answered in time; `is_late`: a group runs it all the same."""
        request.is_open = False
        tally = self._tally(request)
        tally.late += is_late
        tally.expired += not is_late
        if (promise := self.promises.pop(request, None)) is not None:
            self.outlook.missed(promise)

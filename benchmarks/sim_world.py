"""A simulated mesh for the routing benchmark: groups that run steps one after the other and fall ill, requests that arrive at random.

Time is simulated; what decides is given (`Router`), and can be the real one. One request is one batch: how batches grow is another matter.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from itertools import count
from typing import Final, Protocol

FIXED_S: Final = 0.020
PER_ROW_S: Final = 0.005
MAX_ROWS: Final = 8
MEAN_STEP_S: Final = FIXED_S + PER_ROW_S * (MAX_ROWS + 1) / 2
#: Way to a group of the own zone and back, and to one of another zone, seconds.
NEAR_S: Final = 0.0005
FAR_S: Final = 0.002
#: From arrival to deadline, seconds.
TIMEOUT_S: Final = 2.0
MAX_ATTEMPTS: Final = 3
#: Spread of the logarithm of step times.
NOISE: Final = 0.15
#: A group that comes back runs so many steps at so many times their usual time.
COLD_STEPS: Final = 10
COLD_FACTOR: Final = 3.0
SLOW_FACTOR: Final = 10.0
#: A failing group answers everything with an error after so long.
FAIL_S: Final = 0.001


class Illness(Enum):
    """What can happen to a group."""

    #: Runs nothing, and goes on where it stopped.
    HUNG = auto()
    #: Steps take SLOW_FACTOR times as long.
    SLOW = auto()
    #: Every batch is lost at once.
    FAILING = auto()
    #: The link is down, and what it had is lost. Everybody sees that.
    DOWN = auto()


@dataclass(slots=True, eq=False)
class SimRequest:
    """One request, on its way."""

    rows: int
    arrived_s: float
    num_attempts: int = 0
    #: Groups that lost it.
    avoid: tuple[int, ...] = ()
    group: SimGroup | None = None
    #: What the router wants back.
    ticket: object = None
    is_open: bool = True


@dataclass(slots=True, eq=False)
class SimGroup:
    """A group that runs one step at a time."""

    index: int
    zone: str
    #: Its steps take so many times those of the quickest kind.
    speed: float
    waiting: deque[SimRequest] = field(default_factory=deque)
    running: SimRequest | None = None
    running_s: float = 0.0
    #: The step of a hung group would have ended.
    is_due: bool = False
    illness: Illness | None = None
    num_cold: int = 0
    #: Raised when what was running is lost: its end is no event any more.
    run: int = 0


class Router(Protocol):
    """What is compared."""

    def choose(self, request: SimRequest, now_s: float) -> int | None:
        """The group's index; None: wait."""

    def began(self, group: SimGroup, request: SimRequest, now_s: float) -> object:
        """Returns a ticket, which comes back with the outcome."""

    def answered(self, ticket: object, step_s: float, now_s: float) -> None:
        """The group answered."""

    def lost(self, ticket: object, now_s: float, *, is_timeout: bool) -> None:
        """It did not."""

    def link(self, group: SimGroup, now_s: float, *, is_up: bool) -> None:
        """A link came up or went down."""


@dataclass(slots=True)
class Result:
    """What came of all requests."""

    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    num_lost: int = 0
    num_timeouts: int = 0
    num_retries: int = 0
    num_far: int = 0
    num_sent: int = 0


@dataclass(slots=True, eq=False)
class World:
    """`run` until all requests are answered or given up."""

    groups: list[SimGroup]
    router: Router
    #: Requests a second, and how many in all.
    rate: float
    num_requests: int
    random: random.Random
    own_zone: str = ""
    result: Result = field(default_factory=Result)
    now_s: float = 0.0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: count[int] = field(default_factory=count)
    _queue: deque[SimRequest] = field(default_factory=deque)
    _retries: deque[SimRequest] = field(default_factory=deque)
    #: In order of their deadlines.
    _open: deque[SimRequest] = field(default_factory=deque)

    def at(self, instant_s: float, event: Callable[[], None]) -> None:
        """Has `event` happen."""
        heapq.heappush(self._events, (instant_s, next(self._order), event))

    def fall_ill(self, group: SimGroup, illness: Illness, from_s: float, to_s: float) -> None:
        """Plans an illness."""
        self.at(from_s, lambda: self._begin_illness(group, illness))
        self.at(to_s, lambda: self._end_illness(group))

    def run(self) -> Result:
        """All of it."""
        for group in self.groups:
            self.router.link(group, 0.0, is_up=True)
        arrival_s, num_left = self.random.expovariate(self.rate), self.num_requests
        events, opened = self._events, self._open
        while num_left or opened:
            next_s = min(
                arrival_s if num_left else float("inf"), events[0][0] if events else float("inf"),
                opened[0].arrived_s + TIMEOUT_S if opened else float("inf"),
            )
            self.now_s = next_s
            if num_left and arrival_s == next_s:
                request = SimRequest(self.random.randint(1, MAX_ROWS), next_s)
                opened.append(request)
                self._queue.append(request)
                num_left -= 1
                arrival_s += self.random.expovariate(self.rate)
            elif events and events[0][0] == next_s:
                heapq.heappop(events)[2]()
            else:
                self._expire(opened[0])
            while opened and not opened[0].is_open:
                opened.popleft()
            if self._queue or self._retries:
                self._pump()
        return self.result

    def _pump(self) -> None:
        for queue in (self._retries, self._queue):
            while queue:
                request = queue[0]
                if request.is_open:
                    index = self.router.choose(request, self.now_s)
                    if index is None:
                        break
                    self._send(self.groups[index], request)
                queue.popleft()

    def _send(self, group: SimGroup, request: SimRequest) -> None:
        request.num_attempts += 1
        request.group = group
        request.ticket = self.router.began(group, request, self.now_s)
        is_far = group.zone != self.own_zone
        self.result.num_sent += 1
        self.result.num_far += is_far
        self.at(self.now_s + (FAR_S if is_far else NEAR_S) / 2, lambda: self._arrive(group, request))

    def _arrive(self, group: SimGroup, request: SimRequest) -> None:
        if request.group is not group:
            return
        if group.illness is Illness.DOWN:
            self._lose(request)
        elif group.illness is Illness.FAILING:
            self.at(self.now_s + FAIL_S, lambda: self._lose(request) if request.group is group else None)
        else:
            group.waiting.append(request)
            if group.running is None:
                self._step(group)

    def _step(self, group: SimGroup) -> None:
        """The group begins its next step."""
        waiting = group.waiting
        while waiting:
            request = waiting.popleft()
            if request.group is group:
                step_s = (FIXED_S + PER_ROW_S * request.rows) * group.speed * self.random.lognormvariate(0.0, NOISE)
                if group.num_cold:
                    group.num_cold -= 1
                    step_s *= COLD_FACTOR
                if group.illness is Illness.SLOW:
                    step_s *= SLOW_FACTOR
                group.running, group.running_s = request, step_s
                self.at(self.now_s + step_s, partial(self._end_step_of, group, group.run))
                return

    def _end_step_of(self, group: SimGroup, run: int) -> None:
        if group.run == run:
            self._end_step(group)

    def _end_step(self, group: SimGroup) -> None:
        if group.illness is Illness.HUNG:
            group.is_due = True
            return
        request, step_s = group.running, group.running_s
        group.running = None
        group.is_due = False
        if request is not None and request.group is group:
            back_s = self.now_s + (NEAR_S if group.zone == self.own_zone else FAR_S) / 2
            self.at(back_s, lambda: self._answer(group, request, step_s))
        self._step(group)

    def _answer(self, group: SimGroup, request: SimRequest, step_s: float) -> None:
        if request.group is group:
            request.is_open = False
            request.group = None
            self.result.latencies_s.append(self.now_s - request.arrived_s)
            self.router.answered(request.ticket, step_s, self.now_s)

    def _lose(self, request: SimRequest) -> None:
        """The attempt is lost: another one, or none."""
        group = request.group
        assert group is not None
        request.group = None
        self.router.lost(request.ticket, self.now_s, is_timeout=False)
        if request.num_attempts >= MAX_ATTEMPTS:
            request.is_open = False
            self.result.num_lost += 1
        else:
            request.avoid = (*request.avoid, group.index)
            self.result.num_retries += 1
            self._retries.append(request)

    def _expire(self, request: SimRequest) -> None:
        request.is_open = False
        self.result.num_timeouts += 1
        if request.group is not None:
            request.group = None
            self.router.lost(request.ticket, self.now_s, is_timeout=True)

    def _begin_illness(self, group: SimGroup, illness: Illness) -> None:
        group.illness = illness
        if illness not in (Illness.DOWN, Illness.FAILING):
            return
        lost = [request for request in (group.running, *group.waiting) if request is not None and request.group is group]
        group.running = None
        group.waiting.clear()
        group.run += 1
        if illness is Illness.DOWN:
            self.router.link(group, self.now_s, is_up=False)
        for request in lost:
            self._lose(request)

    def _end_illness(self, group: SimGroup) -> None:
        was_down = group.illness is Illness.DOWN
        group.illness = None
        if was_down:
            group.num_cold = COLD_STEPS
            self.router.link(group, self.now_s, is_up=True)
        if group.is_due:
            self._end_step(group)

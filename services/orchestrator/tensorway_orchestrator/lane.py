"""The lane of one revision: its queue, its groups, and the requests on their way between them. Acts on what the pure modules decide."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from tensorway.deadline import Deadline
from tensorway.errors import DeadlineExceeded, Overloaded, TensorwayError, Unavailable
from tensorway.signature import RevisionSpec
from tensorway.transport.port import Payload
from tensorway_orchestrator import wire
from tensorway_orchestrator.admission import HeldBytes, LaneLoad, no_group, refusal
from tensorway_orchestrator.batching import BatchLimits, Burst, ShapeRule, Waiting, burst_window_s, leave_at_s
from tensorway_orchestrator.metrics import LaneMetrics
from tensorway_orchestrator.pool import Group, SentBatch
from tensorway_orchestrator.requests import Request, RequestQueue
from tensorway_orchestrator.retry import RetryBudget, RetryPolicy, should_retry
from tensorway_orchestrator.routing import Candidate, choose

#: A wait shorter than this is not worth a timer.
_AT_ONCE_S: Final = 0.0002
#: A leader that is full is left alone for at least this long.
_MIN_REST_S: Final = 0.002
_AFTER_THE_ANSWER: Final = float("inf")
_BATCH_IDS: Final = count(1)


@dataclass(slots=True, eq=False)
class Lane:
    """One revision. All methods run in the loop and none of them waits."""

    spec: RevisionSpec
    limits: BatchLimits
    rule: ShapeRule
    policy: RetryPolicy
    #: How long requests wait for a group while none lives, seconds.
    group_wait_s: float
    metrics: LaneMetrics
    held: HeldBytes
    budget: RetryBudget = field(init=False)
    groups: dict[str, Group] = field(default_factory=dict)
    queue: RequestQueue = field(default_factory=RequestQueue)
    burst: Burst = field(default_factory=Burst)
    num_open: int = 0
    _groupless_since_s: float = field(default_factory=time.monotonic)
    _leave_timer: asyncio.TimerHandle | None = None
    _groupless_timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.budget = RetryBudget(self.policy)

    def start(self) -> None:
        """Begins the wait for a first group."""
        self._await_group()

    def offer(self, request: Request) -> None:
        """Admits a request, or answers it at once with why not."""
        now_s = request.arrived_s
        refused = refusal(request, self.spec, self.limits, self._load(now_s), now_s)
        if refused is not None:
            self.metrics.failed(refused.status.name)
            request.origin.fail(refused)
            return
        self.budget.deposit()
        self.num_open += 1
        self.held.total += request.num_bytes
        loop = asyncio.get_running_loop()
        timer = loop.call_later(max(0.0, request.deadline_s - now_s), self._expire, request)
        request.on_close = timer.cancel
        request.origin.on_cancel(lambda: self._withdraw(request))
        self.queue.offer(request)
        self.burst.arrived(request.weight, now_s)
        self.pump()

    def _load(self, now_s: float) -> LaneLoad:
        is_given_up = not self._has_group() and now_s - self._groupless_since_s > self.group_wait_s
        return LaneLoad(self.queue.num_rows, self.held, self._candidates(), is_given_up)

    def _candidates(self) -> list[Candidate]:
        return [group.candidate() for group in self.groups.values() if group.can_take]

    def pump(self) -> None:
        """Sends batches for as long as one may leave."""
        if self._leave_timer is not None:
            self._leave_timer.cancel()
            self._leave_timer = None
        while (head := self.queue.peek()) is not None:
            now_s = time.monotonic()
            group = self._choose(head, now_s)
            if group is None:
                return
            waiting = Waiting(self.queue.num_rows, head.arrived_s, head.deadline_s)
            leave_s = leave_at_s(self.limits, waiting, group.load(), self.burst, now_s)
            if leave_s == _AFTER_THE_ANSWER:
                return
            if leave_s > now_s + _AT_ONCE_S:
                self._leave_timer = asyncio.get_running_loop().call_later(leave_s - now_s, self.pump)
                return
            self._send(group, self.queue.take(self.limits.max_rows, self.limits.max_bytes, self.limits.max_requests), now_s)

    def group_changed(self, group: Group, is_gone: bool) -> None:
        """A group connected, broke, leaves or is gone."""
        if is_gone:
            self.groups.pop(group.id, None)
        else:
            self.groups[group.id] = group
        if self._has_group():
            if self._groupless_timer is not None:
                self._groupless_timer.cancel()
                self._groupless_timer = None
            self._groupless_since_s = float("inf")
            self.pump()
        else:
            self._await_group()

    def close(self) -> None:
        """The revision is withdrawn: answers what waits."""
        for timer in (self._leave_timer, self._groupless_timer):
            if timer is not None:
                timer.cancel()
        for request in self.queue.drain():
            self._fail(request, Unavailable(f"model {self.spec.model!r} revision {self.spec.revision[:12]} was withdrawn"))

    def batch_answered(self, group: Group, batch: SentBatch, requests: Sequence[Request], head: bytes, payload: Payload) -> None:
        """A group has answered a batch: pass every result on, then fill the group again."""
        now_s = time.monotonic()
        group.end(batch)
        try:
            reply = wire.read_batch_reply(head, payload, len(requests))
        except TensorwayError as error:
            self.batch_lost(group, None, requests, Unavailable(f"group {group.id}: {error}"))
            return
        if not requests[0].is_explanation:
            group.observe(batch, reply.step_us / 1e6, reply.wait_us / 1e6, now_s)
        self.metrics.batch(batch.rows, reply.step_us / 1e6)
        self.burst.answered(batch.rows, burst_window_s(self.limits, group.step_times), now_s)
        # The next batch first: the group must not wait while answers are written.
        self.pump()
        is_first = True
        for request, result in zip(requests, reply.results, strict=True):
            if request.is_open:
                if isinstance(result, TensorwayError):
                    self._retry_or_fail(request, group, result, now_s)
                else:
                    timing = wire.timing_of(reply, request, batch.rows, len(requests), is_first, group.id)
                    self._close(request)
                    self.metrics.answered(request.sent_s - request.arrived_s)
                    request.origin.reply(wire.write_reply(result[0], self.spec.revision, timing), result[1])
            is_first = False

    def batch_lost(self, group: Group, batch: SentBatch | None, requests: Sequence[Request], error: TensorwayError) -> None:
        """The attempt of a whole batch came to nothing: another attempt for each request that may have one."""
        now_s = time.monotonic()
        if batch is not None:
            group.end(batch)
        if isinstance(error, Overloaded):
            self._come_back(group, requests, max(_MIN_REST_S, error.retry_after_s), now_s)
            return
        self.metrics.lost()
        for request in requests:
            if request.is_open:
                self._retry_or_fail(request, group, error, now_s)
        self.pump()

    def _come_back(self, group: Group, requests: Sequence[Request], rest_s: float, now_s: float) -> None:
        """The leader's waiting line is full (another orchestrator's batches, or withdrawn ones it has not met yet). The requests wait here
        again; that was no attempt of theirs."""
        group.rests_until_s = now_s + rest_s
        for request in requests:
            if request.is_open:
                request.num_attempts -= 1
                request.on_abandon = None
                self.queue.offer(request)
        asyncio.get_running_loop().call_later(rest_s, self.pump)
        self.pump()

    def _send(self, group: Group, requests: list[Request], now_s: float) -> None:
        if not requests:
            return
        head, payload = wire.write_batch(next(_BATCH_IDS), group.epoch, requests, now_s)
        rows = 0
        for request in requests:
            rows += request.weight
            request.sent_s = now_s
            request.num_attempts += 1
        batch = group.begin(rows, now_s)
        sink = _BatchSink(self, group, batch, requests)
        deadline = Deadline(max(request.deadline_s for request in requests))
        try:
            link_id = group.link.send(head, payload, deadline, sink)
        except Unavailable as error:
            self.batch_lost(group, batch, requests, error)
            return
        sink.link_id = link_id
        for request in requests:
            request.on_abandon = sink.abandoned

    def _choose(self, head: Request, now_s: float) -> Group | None:
        rows = min(self.queue.num_rows, self.limits.max_rows)
        chosen = choose(self._candidates(), rows, frozenset(head.lost_groups), now_s, random.randrange)
        return None if chosen is None else self.groups[chosen.id]

    def _retry_or_fail(self, request: Request, group: Group, error: TensorwayError, now_s: float) -> None:
        if should_retry(error, request.num_attempts, request.deadline_s, now_s, self.policy, self.budget):
            request.lost_groups = (*request.lost_groups, group.id)
            request.on_abandon = None
            self.metrics.retried()
            self.queue.offer(request)
        else:
            self._fail(request, error)

    def _expire(self, request: Request) -> None:
        """The deadline has passed, wherever the request is."""
        if not request.is_open:
            return
        on_group = request.on_abandon is not None
        self._drop(request)
        where = f"while a group ran it (attempt {request.num_attempts})" if on_group else "in the queue"
        self.metrics.failed("DEADLINE_EXCEEDED")
        request.origin.fail(DeadlineExceeded(
            f"the deadline of request {request.request_id!r} for model {self.spec.model!r} passed {where}",
            hop="group" if on_group else "orchestrator",
        ))

    def _withdraw(self, request: Request) -> None:
        """The gateway has cancelled it, or is gone."""
        if request.is_open:
            self.metrics.failed("CANCELLED")
            self._drop(request)

    def _drop(self, request: Request) -> None:
        """Closes a request that is in the queue or on a group."""
        abandon = request.on_abandon
        self._close(request)
        if abandon is None:
            self.queue.withdraw(request)
        else:
            abandon()

    def _fail(self, request: Request, error: TensorwayError) -> None:
        self._close(request)
        self.metrics.failed(error.status.name)
        request.origin.fail(error)

    def _close(self, request: Request) -> None:
        request.is_open = False
        self.num_open -= 1
        self.held.total -= request.num_bytes
        if request.on_close is not None:
            request.on_close()
        request.on_close = request.on_abandon = None

    def _await_group(self) -> None:
        """No group lives: requests wait for one, but not for ever."""
        self._groupless_since_s = min(self._groupless_since_s, time.monotonic())
        if self._groupless_timer is None:
            self._groupless_timer = asyncio.get_running_loop().call_later(self.group_wait_s, self._give_up)

    def _give_up(self) -> None:
        """No group has come back in time."""
        self._groupless_timer = None
        for request in self.queue.drain():
            self._fail(request, no_group(self.spec))

    def _has_group(self) -> bool:
        return any(group.can_take for group in self.groups.values())


@dataclass(slots=True, eq=False)
class _BatchSink:
    """Where the outcome of one sent batch goes."""

    lane: Lane
    group: Group
    batch: SentBatch
    requests: list[Request]
    link_id: int = -1

    def on_reply(self, head: bytes, payload: Payload) -> None:
        self.lane.batch_answered(self.group, self.batch, self.requests, head, payload)

    def on_error(self, error: TensorwayError) -> None:
        self.lane.batch_lost(self.group, self.batch, self.requests, error)

    def abandoned(self) -> None:
        """One request was closed; once all are, the batch is cancelled on the group."""
        if not any(request.is_open for request in self.requests):
            self.group.link.cancel(self.link_id)
            self.group.end(self.batch)
            self.lane.pump()

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
from tensorway.errors import DeadlineExceeded, InvalidRequest, Overloaded, TensorwayError, Unavailable
from tensorway.signature import RevisionSpec
from tensorway.transport.port import Payload
from tensorway_orchestrator import wire
from tensorway_orchestrator.batching import BatchLimits, Burst, ShapeRule, Waiting, burst_window_s, leave_at_s
from tensorway_orchestrator.metrics import LaneMetrics
from tensorway_orchestrator.pool import Group, SentBatch
from tensorway_orchestrator.requests import Request, RequestQueue
from tensorway_orchestrator.retry import RetryBudget, RetryPolicy, should_retry
from tensorway_orchestrator.routing import choose, predict_finish_s

#: A wait shorter than this is not worth a timer.
_AT_ONCE_S: Final = 0.0002
_AFTER_THE_ANSWER: Final = float("inf")
_BATCH_IDS: Final = count(1)


@dataclass(slots=True)
class HeldBytes:
    """Tensor bytes of all open requests of this orchestrator."""

    limit: int
    total: int = 0


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
        refusal = self._refusal(request, now_s)
        if refusal is not None:
            self.metrics.refused(refusal)
            request.origin.fail(refusal)
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

    def _refusal(self, request: Request, now_s: float) -> TensorwayError | None:
        spec = self.spec
        if request.deadline_s <= now_s:
            return DeadlineExceeded(f"the deadline of request {request.request_id!r} had passed on arrival", hop="orchestrator")
        if request.rows > self.limits.max_rows and spec.signature.is_batchable and spec.batching.oversize == "refuse":
            return _oversize(request, spec)
        if not self._has_group() and now_s - self._groupless_since_s > self.group_wait_s:
            return self._no_group()
        if self.queue.num_rows + request.weight > spec.batching.max_queue_rows:
            wait_s = max(0.05, self.queue.num_rows / self.limits.max_rows * self._step_s())
            return Overloaded(
                f"the queue of model {spec.model!r} is full: {self.queue.num_rows} of {spec.batching.max_queue_rows} rows wait",
                retry_after_s=wait_s,
            )
        if self.held.total + request.num_bytes > self.held.limit and self.held.total:
            return Overloaded(
                f"this orchestrator holds {self.held.total} of {self.held.limit} tensor bytes; the request has {request.num_bytes}",
                retry_after_s=max(0.05, self._step_s()),
            )
        return self._doomed(request, now_s)

    def _doomed(self, request: Request, now_s: float) -> TensorwayError | None:
        """A request whose predicted finish is past its deadline is refused before it costs anything."""
        spec = self.spec
        candidates = [group.candidate() for group in self.groups.values() if group.can_take]
        finish_s = predict_finish_s(candidates, self.queue.num_rows, request.weight, self.limits.max_rows, now_s)
        if finish_s is not None and finish_s > request.deadline_s and self.queue.num_rows:
            return DeadlineExceeded(
                f"model {spec.model!r} would answer in {finish_s - now_s:.3f} s, the deadline is in {request.deadline_s - now_s:.3f} s",
                hop="orchestrator", retry_after_s=max(0.05, finish_s - request.deadline_s),
            )
        return None

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
        self.metrics.lost()
        for request in requests:
            if request.is_open:
                self._retry_or_fail(request, group, error, now_s)
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
        candidates = [group.candidate() for group in self.groups.values() if group.can_take]
        rows = min(self.queue.num_rows, self.limits.max_rows)
        chosen = choose(candidates, rows, frozenset(head.lost_groups), now_s, random.randrange)
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
            self._fail(request, self._no_group())

    def _has_group(self) -> bool:
        return any(group.can_take for group in self.groups.values())

    def _no_group(self) -> Unavailable:
        return Unavailable(
            f"no group serves model {self.spec.model!r} now; `tensorway models` says why", retry_after_s=1.0
        )

    def _step_s(self) -> float:
        return max((group.step_times.predict_s(self.limits.max_rows) for group in self.groups.values()), default=0.0)


def _oversize(request: Request, spec: RevisionSpec) -> TensorwayError:
    return InvalidRequest(
        f"the request has {request.rows} rows, model {spec.model!r} takes at most {spec.batching.max_rows}; send several requests",
        field="inputs",
    )


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

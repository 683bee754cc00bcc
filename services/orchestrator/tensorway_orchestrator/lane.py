"""The lane of one revision: its queue, its groups, and the batches on their way between them. Acts on what the pure modules decide."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from tensorway.deadline import Deadline
from tensorway.errors import Overloaded, TensorwayError, Unavailable
from tensorway.signature import RevisionSpec
from tensorway.transport.port import Payload
from tensorway_orchestrator import wire
from tensorway_orchestrator.admission import HeldBytes, LaneLoad, doomed, no_group, refusal
from tensorway_orchestrator.batch_attempt import BatchAttempt
from tensorway_orchestrator.batching import BatchLimits, Burst, ShapeRule, Waiting, burst_window_s, leave_at_s
from tensorway_orchestrator.boarding import board
from tensorway_orchestrator.group_record import GroupRecord
from tensorway_orchestrator.group_wait import GroupWait
from tensorway_orchestrator.hedging import Hedger
from tensorway_orchestrator.load import LaneMeter
from tensorway_orchestrator.metrics import LaneMetrics
from tensorway_orchestrator.open_requests import OpenRequests
from tensorway_orchestrator.outlook import Outlook
from tensorway_orchestrator.pool import Group
from tensorway_orchestrator.quarantine import Quarantine
from tensorway_orchestrator.recovery import Recovery
from tensorway_orchestrator.request_trace import begun
from tensorway_orchestrator.requests import Request, RequestQueue
from tensorway_orchestrator.retry import RetryBudget, RetryPolicy
from tensorway_orchestrator.roster import Roster
from tensorway_orchestrator.routing import MAX_BATCHES_IN_FLIGHT
from tensorway_orchestrator.standing import Failure

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
    meter: LaneMeter
    #: Where this orchestrator runs; "" for nowhere in particular.
    zone: str = ""
    quarantine: Quarantine = field(default_factory=Quarantine)
    roster: Roster = field(init=False)
    budget: RetryBudget = field(init=False)
    outlook: Outlook = field(init=False)
    open: OpenRequests = field(init=False)
    recovery: Recovery = field(init=False)
    hedger: Hedger | None = None
    groups: dict[str, Group] = field(default_factory=dict)
    queue: RequestQueue = field(default_factory=RequestQueue)
    burst: Burst = field(default_factory=Burst)
    wait: GroupWait = field(init=False)
    _leave_timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        spec = self.spec
        self.budget = RetryBudget(self.policy.covering(MAX_BATCHES_IN_FLIGHT * self.limits.max_requests))
        self.roster = Roster(self.limits.max_rows if self.limits.max_requests > 1 else 1, random.randrange, zone=self.zone)
        self.hedger = None if spec.hedging is None else Hedger(spec.hedging)
        self.outlook = Outlook(self.roster)
        self.open = OpenRequests(spec.model, self.queue, self.held, self.metrics, self.outlook)
        self.recovery = Recovery(spec.model, self.open, self.policy, self.budget, self.hedger, self.metrics, self.pump, self.quarantine)
        self.wait = GroupWait(self.group_wait_s, self._give_up)

    @property
    def num_open(self) -> int:
        """Requests that are not answered."""
        return self.open.count

    def start(self) -> None:
        """Begins the wait for a first group."""
        self.wait.missing(is_registered=False)

    def offer(self, request: Request) -> None:
        """Admits a request, or answers it at once with why not."""
        now_s = request.arrived_s
        self.meter.arrived(request.weight, now_s)
        refused = refusal(request, self.spec, self.limits, self._load(request, now_s), now_s) or self.recovery.refusal(request, now_s)
        if refused is not None:
            self.open.refuse(request, refused)
            return
        self.budget.deposit()
        if self.hedger is not None:
            self.hedger.arrived()
        self.open.admit(request, now_s)
        self.outlook.admitted(request.priority, request.weight, now_s)
        self.queue.offer(request)
        self.burst.arrived(request.weight, now_s)
        self.pump()

    def pump(self) -> None:
        """Sends batches for as long as one may leave."""
        if self._leave_timer is not None:
            self._leave_timer.cancel()
            self._leave_timer = None
        while (head := self.queue.peek()) is not None:
            now_s = time.monotonic()
            chosen = self._choose(head, now_s)
            if chosen is None:
                self._pump_at(self.roster.next_change_s(), now_s)
                return
            head, record = chosen
            waiting = Waiting(self.queue.num_rows, head.arrived_s, head.deadline_s)
            # What goes alone has no company to wait for.
            leave_s = now_s if head.alone else leave_at_s(self.limits, waiting, record.load(), self.burst, now_s)
            if leave_s > now_s + _AT_ONCE_S:
                self._pump_at(leave_s, now_s)
                return
            boarding = board(self.queue, head, record, self.limits, now_s)
            for request in boarding.doomed:
                if not request.carriers:
                    self.open.give_up(request, doomed(request, self.spec, max(request.deadline_s, record.earliest_s(1, now_s)), now_s))
            self._send(self.groups[record.id], boarding.taken, now_s)

    def _pump_at(self, instant_s: float, now_s: float) -> None:
        """Infinity: whatever makes room pumps."""
        if instant_s != _AFTER_THE_ANSWER:
            self._leave_timer = asyncio.get_running_loop().call_later(max(0.0, instant_s - now_s), self.pump)

    def group_changed(self, group: Group, is_gone: bool) -> None:
        """A group came, connected, broke, leaves or is gone."""
        if is_gone:
            self.groups.pop(group.id, None)
            group.part()
        else:
            self.groups[group.id] = group
            group.follow(self.roster)
        if self.roster.has_live:
            self.wait.found()
            self.pump()
        else:
            self.wait.missing(is_registered=bool(self.groups))

    def close(self) -> None:
        """The revision is withdrawn: answers what waits."""
        self.recovery.is_closed = True
        self.wait.stop()
        if self._leave_timer is not None:
            self._leave_timer.cancel()
        for request in self.queue.drain():
            self.open.fail(request, Unavailable(f"model {self.spec.model!r} revision {self.spec.revision[:12]} was withdrawn"))

    def answered(self, attempt: BatchAttempt, head: bytes, payload: Payload) -> None:
        """See `BatchListener`: passes every result on, and fills the group again."""
        group, batch, requests = attempt.group, attempt.sending.batch, attempt.requests
        roster = attempt.sending.roster
        now_s = time.monotonic()
        try:
            reply = wire.read_batch_reply(head, payload, len(requests))
        except TensorwayError as error:
            self._lost(attempt, requests, Unavailable(f"group {group.id}: {error}"))
            return
        if requests[0].is_explanation:
            roster.answered(batch, now_s)
        else:
            roster.observed(batch, reply.step_us / 1e6, reply.wait_us / 1e6, now_s)
            if self.hedger is not None:
                self.hedger.times.observe(now_s - batch.sent_s)
        self.metrics.batch(batch.rows, reply.step_us / 1e6)
        self.meter.answered(batch.rows, reply.step_us / 1e6, batch.sent_s - requests[0].arrived_s, now_s)
        self.burst.answered(batch.rows, burst_window_s(self.limits, batch.record.times), now_s)
        # The next batch first: the group must not wait while answers are written.
        self.pump()
        for number, (request, result) in enumerate(zip(requests, reply.results, strict=True)):
            if request.is_open:
                if isinstance(result, TensorwayError):
                    self._failed(attempt, request, result)
                else:
                    timing = wire.timing_of(reply, request, batch, len(requests), number == 0, group.id)
                    if request.num_hedges and group.id not in request.lost_groups:
                        self.metrics.hedge_won()
                    self.open.answer(request, batch.sent_s, wire.write_reply(result[0], self.spec.revision, timing), result[1])

    def lost(self, attempt: BatchAttempt, error: TensorwayError) -> None:
        """See `BatchListener`: another attempt for each request that may have one."""
        if isinstance(error, Overloaded):
            self._come_back(attempt, max(_MIN_REST_S, error.retry_after_s))
        else:
            self._lost(attempt, attempt.requests, error)

    def late(self, attempt: BatchAttempt) -> None:
        """See `BatchListener`: a hedge where the author wants one, and help for what may be stuck."""
        if attempt.may_hedge:
            attempt.may_hedge = False
            if self.roster.num_live > 1:
                self.recovery.hedge(attempt)
            attempt.watch_stuck(time.monotonic())
        else:
            self.metrics.stuck()
            self._blame(attempt, Failure.TIMEOUT)
            if self.roster.num_live > 1:
                self.recovery.stuck(attempt)

    def _failed(self, attempt: BatchAttempt, request: Request, error: TensorwayError) -> None:
        """The group answered this one with an error."""
        if error.is_retryable:
            self.recovery.lost(attempt, (request,), error, is_death=False)
        else:
            self.open.fail(request, error)

    def _lost(self, attempt: BatchAttempt, requests: Sequence[Request], error: TensorwayError) -> None:
        self.metrics.lost()
        self._blame(attempt, Failure.LOST)
        self.recovery.lost(attempt, requests, error, is_death=attempt.group.has_died)
        self.pump()

    def _blame(self, attempt: BatchAttempt, failure: Failure) -> None:
        attempt.sending.roster.failed(attempt.sending.batch, failure, time.monotonic())

    def _come_back(self, attempt: BatchAttempt, rest_s: float) -> None:
        """The leader's waiting line is full (another orchestrator's batches, or withdrawn ones it has not met yet). The requests wait here
        again; that was no attempt of theirs."""
        now_s = time.monotonic()
        attempt.sending.roster.rests(attempt.sending.batch.record, now_s + rest_s, now_s)
        for request in attempt.requests:
            if request.is_open and not request.is_queued:
                request.num_attempts -= 1
                self.queue.offer(request)
        self.pump()

    def _send(self, group: Group, requests: list[Request], now_s: float) -> None:
        rows = 0
        for request in requests:
            rows += request.weight
            request.num_attempts += 1
        trace = begun(requests, group.id, rows, now_s)
        head, payload = wire.write_batch(next(_BATCH_IDS), group.epoch, requests, now_s, trace)
        exclusion = group.begin(rows, now_s) if requests[0].alone else None
        attempt = BatchAttempt(self, group, requests, group.begin(rows, now_s), exclusion, trace)
        for request in requests:
            request.carriers.append(attempt)
        try:
            attempt.link_id = group.link.send(head, payload, Deadline(max(request.deadline_s for request in requests)), attempt)
        except Unavailable as error:
            attempt.on_error(error)
            return
        if not requests[0].is_explanation:
            self._watch(attempt, now_s)

    def _watch(self, attempt: BatchAttempt, now_s: float) -> None:
        delay_s = None if self.hedger is None else self.hedger.delay_s()
        if delay_s is not None:
            attempt.may_hedge = True
            attempt.watch(delay_s)
        else:
            attempt.watch_stuck(now_s)

    def _load(self, request: Request, now_s: float) -> LaneLoad:
        rows_ahead, roster = self.queue.rows_ahead(request.priority), self.roster
        is_busy = rows_ahead > 0 or not roster.rotation.num_idle
        if is_busy:
            request.promise = self.outlook.promise(rows_ahead, request.weight, request.priority, now_s)
        finish_s = None if request.promise is None else request.promise.finish_s
        step_s = roster.forecast.typical.predict_s(self.limits.max_rows)
        return LaneLoad(self.queue.num_rows, self.held, self.wait.is_over(now_s), step_s, finish_s)

    def _choose(self, head: Request, now_s: float) -> tuple[Request, GroupRecord] | None:
        """The next batch's first request and its group: what must avoid a group does not hold up what may go there."""
        chosen = self._choose_for(head, now_s)
        if chosen is not None or not (head.lost_groups or head.alone):
            return chosen
        for other in self.queue.heads():
            if not (other.lost_groups or other.alone) and (chosen := self._choose_for(other, now_s)) is not None:
                return chosen
        return None

    def _choose_for(self, head: Request, now_s: float) -> tuple[Request, GroupRecord] | None:
        rows = min(self.queue.num_rows, self.limits.max_rows)
        record = self.roster.choose(rows, head.lost_groups, now_s)
        if record is None or (head.alone and record.in_flight):
            return None
        if head.carriers and record.id in head.lost_groups:
            return None  # a hedge has nowhere else to go
        return head, record

    def _give_up(self) -> None:
        """No group has come back in time."""
        for request in self.queue.drain():
            self.open.fail(request, no_group(self.spec))

"""What becomes of requests whose attempt came to nothing, or is late. Acts on what the pure modules decide."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from tensorway.errors import TensorwayError, Unavailable
from tensorway_orchestrator import quarantine as words
from tensorway_orchestrator import wire
from tensorway_orchestrator.batch_attempt import BatchAttempt
from tensorway_orchestrator.hedging import Hedger
from tensorway_orchestrator.metrics import LaneMetrics
from tensorway_orchestrator.open_requests import OpenRequests
from tensorway_orchestrator.quarantine import MAX_DEATHS, Death, Quarantine
from tensorway_orchestrator.request_trace import log_fields, message_of
from tensorway_orchestrator.requests import Request
from tensorway_orchestrator.retry import RetryBudget, RetryPolicy, pause_s, should_retry

_LOG = logging.getLogger(__name__)
_ALONE: Final = count(1)


@dataclass(slots=True, eq=False)
class Recovery:
    """Of one revision. Lives in the loop; nothing here waits."""

    model: str
    open: OpenRequests
    policy: RetryPolicy
    budget: RetryBudget
    #: None: the author wants no hedges.
    hedger: Hedger | None
    metrics: LaneMetrics
    #: Called when the queue has something that it had not.
    on_queued: Callable[[], None]
    #: Other orchestrators' finds are in it, too.
    quarantine: Quarantine = field(default_factory=Quarantine)
    #: The revision was withdrawn: what is with a group may be answered, but nothing is sent again.
    is_closed: bool = False

    def refusal(self, request: Request, now_s: float) -> TensorwayError | None:
        """Why the request's content is not run; None where it is."""
        if not self.quarantine:
            return None
        fingerprint = wire.fingerprint(request.head, request.payload)
        return words.refused(self.model, fingerprint) if self.quarantine.holds(fingerprint, now_s) else None

    def lost(self, attempt: BatchAttempt, requests: Sequence[Request], error: TensorwayError, *, is_death: bool) -> None:
        """The attempt gave those of its requests no answer that counts: another attempt for each that may have one."""
        now_s = time.monotonic()
        again: list[Request] = []
        for request in requests:
            if not request.is_open:
                continue
            request.num_lost += 1
            if attempt.trace is not None:
                attempt.trace.failed(request, message_of(error))
            if attempt.group.id not in request.lost_groups:
                request.lost_groups = (*request.lost_groups, attempt.group.id)
            if is_death:
                self._died(request, attempt, now_s)
            self.open.queue.refile(request)
            if not request.is_open or request.carriers or request.is_queued:
                continue  # it has ended, or another attempt is under way already
            if should_retry(error, request.num_lost, request.deadline_s, now_s, self.policy, self.budget):
                again.append(request)
            else:
                self.open.fail(request, error)
        if again:
            self.metrics.retried(len(again))
            for request in again:
                fields = {"model": self.model, "group": attempt.group.id, "attempts": request.num_attempts}
                _LOG.debug("request lost: %s", error.message, extra={"fields": {**log_fields(request.request_id, request.trace), **fields}})
            # One pause for all: apart, they would come back as many small batches.
            delay_s = pause_s(max(request.num_lost for request in again), random.random())
            asyncio.get_running_loop().call_later(delay_s, self._come_back, again)

    def hedge(self, attempt: BatchAttempt) -> None:
        """Late by the author's rule: those requests that the budget pays for go to a second group, too."""
        hedger = self.hedger
        if hedger is not None:
            chosen = [request for request in _only_here(attempt) if hedger.withdraw()]
            for request in chosen:
                request.num_hedges += 1
            self.metrics.hedged(len(chosen))
            self._send_again(attempt, chosen)

    def stuck(self, attempt: BatchAttempt) -> None:
        """Late beyond all prediction: the group may never answer."""
        now_s = time.monotonic()
        chosen = [request for request in _only_here(attempt) if self.budget.withdraw(now_s)]
        self.metrics.retried(len(chosen))
        self._send_again(attempt, chosen)

    def _send_again(self, attempt: BatchAttempt, requests: Sequence[Request]) -> None:
        """Queues requests that stay with their group meanwhile. Whichever answers first counts."""
        if self.is_closed:
            return
        for request in requests:
            request.lost_groups = (*request.lost_groups, attempt.group.id)
            self.open.queue.offer(request)
        if requests:
            self.on_queued()

    def _come_back(self, requests: Sequence[Request]) -> None:
        now_s = time.monotonic()
        for request in requests:
            if not request.is_open:
                continue
            if self.is_closed:
                self.open.fail(request, Unavailable(f"model {self.model!r} was withdrawn while the request waited for another attempt"))
            elif request.died_on and (refused := self.refusal(request, now_s)) is not None:
                self.open.fail(request, refused)  # another, of the same content, was found deadly meanwhile
            elif not request.is_queued:
                self.open.queue.offer(request)
        self.on_queued()

    def _died(self, request: Request, attempt: BatchAttempt, now_s: float) -> None:
        """A group died with the request. Two are enough where the second had nothing else."""
        death = Death(attempt.group.node, now_s)
        if death.is_one_with(request.death):
            request.num_lost -= 1
        else:
            request.died_on = (*request.died_on, attempt.group.id)
        request.death = death
        if len(request.died_on) >= MAX_DEATHS and len(attempt.requests) == 1:
            fingerprint = wire.fingerprint(request.head, request.payload)
            self.quarantine.add(fingerprint, request.died_on, now_s)
            self.metrics.quarantined()
            self.open.fail(request, words.killed(self.model, fingerprint, request.died_on))
        else:
            request.alone = next(_ALONE)


def _only_here(attempt: BatchAttempt) -> list[Request]:
    """Its requests that wait for nobody else."""
    return [request for request in attempt.requests if request.is_open and request.carriers == [attempt] and not request.is_queued]

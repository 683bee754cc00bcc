"""One sending of a batch to a group, from the link to its answer."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

from tensorway.errors import TensorwayError
from tensorway.transport.port import Payload
from tensorway_orchestrator.pool import Group, Sending
from tensorway_orchestrator.request_trace import BatchTrace, message_of
from tensorway_orchestrator.requests import Request
from tensorway_orchestrator.retry import stuck_after_s


class BatchListener(Protocol):
    """The lane, which decides what follows. The attempt's place on its group is free whenever it is told."""

    def answered(self, attempt: BatchAttempt, head: bytes, payload: Payload) -> None:
        """The group has answered."""

    def lost(self, attempt: BatchAttempt, error: TensorwayError) -> None:
        """The group has refused the batch, or was lost."""

    def late(self, attempt: BatchAttempt) -> None:
        """The time that `watch` was given is over, and there is no answer."""

    def pump(self) -> None:
        """Nobody waits for the batch any more, and the group was told so: there is room."""


@dataclass(slots=True, eq=False)
class BatchAttempt:
    """See `tensorway.transport.port.ReplySink` and `requests.Carrier`."""

    listener: BatchListener
    group: Group
    requests: list[Request]
    sending: Sending
    #: Keeps all else off the group meanwhile; None where others may be there.
    exclusion: Sending | None = None
    #: None where no request in it is sampled.
    trace: BatchTrace | None = None
    link_id: int = -1
    #: Whether its requests may still be hedged.
    may_hedge: bool = False
    is_over: bool = False
    _timer: asyncio.TimerHandle | None = field(default=None)

    def watch(self, delay_s: float) -> None:
        """Has the listener told when there is no answer after `delay_s`."""
        self._timer = asyncio.get_running_loop().call_later(max(0.0, delay_s), self.listener.late, self)

    def watch_stuck(self, now_s: float) -> None:
        """The same, once the group may be stuck. Nothing where no step was ever measured."""
        batch = self.sending.batch
        if batch.step_s > 0.0:
            self.watch(batch.sent_s + stuck_after_s(batch.due_s - batch.sent_s) - now_s)

    def on_reply(self, head: bytes, payload: Payload) -> None:
        self._end()
        ended_s = 0.0 if self.trace is None else time.monotonic()
        self.listener.answered(self, head, payload)
        if self.trace is not None:
            self.trace.ended(ended_s)

    def on_error(self, error: TensorwayError) -> None:
        self._end()
        ended_s = 0.0 if self.trace is None else time.monotonic()
        self.listener.lost(self, error)
        if self.trace is not None:
            self.trace.ended(ended_s, message_of(error))

    def left(self) -> None:
        """A request was closed; once all are, the batch is cancelled on the group."""
        if not self.is_over and not any(request.is_open for request in self.requests):
            self._end()
            self.group.link.cancel(self.link_id)
            if self.trace is not None:
                self.trace.ended(time.monotonic(), "CANCELLED: nobody waits for it any more")
            self.listener.pump()

    def _end(self) -> None:
        self.is_over = True
        if self._timer is not None:
            self._timer.cancel()
        now_s = time.monotonic()
        self.sending.end(now_s)
        if self.exclusion is not None:
            self.exclusion.end(now_s)
        for request in self.requests:
            if self in request.carriers:
                request.carriers.remove(self)

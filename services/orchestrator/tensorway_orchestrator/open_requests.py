"""The requests of one revision that were admitted and are not answered, wherever they are: each is closed exactly once."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from tensorway.errors import DeadlineExceeded, TensorwayError
from tensorway.transport.port import Payload
from tensorway_orchestrator.admission import HeldBytes
from tensorway_orchestrator.metrics import LaneMetrics
from tensorway_orchestrator.outlook import Outlook
from tensorway_orchestrator.request_trace import log_fields, message_of
from tensorway_orchestrator.requests import Request, RequestQueue

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class OpenRequests:
    """Lives in the loop."""

    model: str
    queue: RequestQueue
    held: HeldBytes
    metrics: LaneMetrics
    outlook: Outlook
    count: int = 0

    def admit(self, request: Request, now_s: float) -> None:
        """From here on the request has a deadline, and its caller may withdraw it."""
        self.count += 1
        self.held.total += request.num_bytes
        timer = asyncio.get_running_loop().call_later(max(0.0, request.deadline_s - now_s), self._expire, request)
        request.on_close = timer.cancel
        request.origin.on_cancel(lambda: self._withdraw(request))

    def refuse(self, request: Request, error: TensorwayError) -> None:
        """The request is not admitted."""
        if request.trace is not None:
            request.trace.closed(time.monotonic(), message_of(error))
        self.metrics.failed(error.status.name)
        self._log("request refused: %s", request, error)
        request.origin.fail(error)

    def answer(self, request: Request, sent_s: float, head: bytes, payload: Payload) -> None:
        """The first answer counts; `sent_s` is when its attempt began."""
        self._close(request)
        if request.promise is not None:
            self.outlook.answered(request.promise, time.monotonic())
        self.metrics.answered(sent_s - request.arrived_s)
        request.origin.reply(head, payload)

    def fail(self, request: Request, error: TensorwayError) -> None:
        """The request ends with `error`."""
        self._close(request)
        if request.trace is not None:
            request.trace.closed(time.monotonic(), message_of(error))
        self.metrics.failed(error.status.name)
        self._log("request failed: %s", request, error)
        request.origin.fail(error)

    def _log(self, message: str, request: Request, error: TensorwayError) -> None:
        if _LOG.isEnabledFor(logging.DEBUG):
            fields = {"model": self.model, "status": error.status.name, "attempts": request.num_attempts}
            _LOG.debug(message, error.message, extra={"fields": {**log_fields(request.request_id, request.trace), **fields}})

    def give_up(self, request: Request, error: TensorwayError) -> None:
        """An admitted request is not answered in time: admission promised too much."""
        if request.promise is not None:
            self.outlook.missed(request.promise)
        self.fail(request, error)

    def _expire(self, request: Request) -> None:
        """The deadline has passed, wherever the request is."""
        if not request.is_open:
            return
        is_running = bool(request.carriers)
        where = f"while a group ran it (attempt {request.num_attempts})" if is_running else "in the queue"
        self.give_up(request, DeadlineExceeded(
            f"the deadline of request {request.request_id!r} for model {self.model!r} passed {where}",
            hop="group" if is_running else "orchestrator",
        ))

    def _withdraw(self, request: Request) -> None:
        """The gateway has cancelled it, or is gone."""
        if request.is_open:
            self._close(request)
            if request.trace is not None:
                request.trace.closed(time.monotonic(), "CANCELLED: the caller has gone")
            if request.promise is not None and time.monotonic() >= request.deadline_s:
                self.outlook.missed(request.promise)  # the gateway's timer was the quicker one
            self.metrics.failed("CANCELLED")

    def _close(self, request: Request) -> None:
        request.is_open = False
        self.count -= 1
        self.held.total -= request.num_bytes
        if request.on_close is not None:
            request.on_close()
            request.on_close = None
        if request.is_queued:
            self.queue.withdraw(request)
        for carrier in tuple(request.carriers):
            carrier.left()
        request.carriers.clear()

"""Counts what became of each request, the same for every path through the gateway."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Protocol

from tensorway.errors import Status, TensorwayError
from tensorway.telemetry.trace_context import SpanContext
from tensorway_gateway.identity.caller import Caller
from tensorway_gateway.models import Model, Revision
from tensorway_gateway.requests import Timing
from tensorway_gateway.statistics import Statistics

_LOG = logging.getLogger(__name__)


class Arrived(Protocol):
    """What is counted of a request."""

    @property
    def model(self) -> str: ...

    @property
    def request_id(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def arrived_s(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Unread:
    """A request whose message could not be read, or says what none may say: all that is known of it."""

    request_id: str
    #: Of the message.
    num_bytes: int
    #: Seconds on `time.monotonic()`.
    arrived_s: float
    #: Nothing was believed of it.
    model: str = ""


class Accounting:
    """Each finished request is told to exactly one of the methods."""

    __slots__ = ("_statistics",)

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics

    def answered(
        self, arrival: Arrived, revision: Revision, rows: int, timing: Timing, trace: SpanContext | None = None,
        caller: Caller | None = None,
    ) -> float:
        """A request that was answered at once; returns the seconds it took."""
        took_s, spec = time.monotonic() - arrival.arrived_s, revision.spec
        self._statistics.revision(spec.model, spec.revision).succeed(rows, timing, took_s, time.time())
        self._statistics.count(spec.model, Status.OK, arrival.num_bytes, took_s)
        self._statistics.answered_by(timing.group)
        if _LOG.isEnabledFor(logging.DEBUG):
            fields = {"group": timing.group, "rows": rows, "attempts": timing.num_attempts}
            _LOG.debug("request answered", extra={"fields": _fields_of(arrival, Status.OK, took_s, trace, caller) | fields})
        return took_s

    def streamed(
        self, arrival: Arrived, revision: Revision | None, trace: SpanContext | None = None, caller: Caller | None = None
    ) -> None:
        """A stream that came to its end. `revision` is None for one that was resumed: its model is not known here."""
        if _LOG.isEnabledFor(logging.DEBUG):
            fields = _fields_of(arrival, Status.OK, time.monotonic() - arrival.arrived_s, trace, caller)
            _LOG.debug("stream ended", extra={"fields": fields})
        if revision is None:
            self._statistics.unknown[Status.OK] += 1
            return
        took_s, spec = time.monotonic() - arrival.arrived_s, revision.spec
        self._statistics.revision(spec.model, spec.revision).succeed_stream(took_s, time.time())
        self._statistics.count(spec.model, Status.OK, arrival.num_bytes, took_s)

    def relayed(self, revision: Revision | None, num_messages: int, first_delta_s: float | None) -> None:
        """What a stream sent to its client, whether or not it came to its end; `first_delta_s` is None where there was no delta."""
        if revision is not None:
            self._statistics.relay(revision.spec.model, num_messages, first_delta_s)

    def failed(
        self, arrival: Arrived, model: Model | None, revision: Revision | None, error: TensorwayError, trace: SpanContext | None = None,
        caller: Caller | None = None,
    ) -> None:
        """A request that ended in `error`, and how far it got."""
        took_s = time.monotonic() - arrival.arrived_s
        self._statistics.errors.add("" if model is None else model.name, arrival.request_id, error)
        if model is None:
            self._statistics.unknown[error.status] += 1
        else:
            self._statistics.count(model.name, error.status, arrival.num_bytes, took_s)
        if revision is not None:
            self._statistics.revision(revision.spec.model, revision.spec.revision).fail(took_s, time.time())
        if _LOG.isEnabledFor(logging.DEBUG):
            _LOG.debug("request failed: %s", error, extra={"fields": _fields_of(arrival, error.status, took_s, trace, caller)})


def _fields_of(
    arrival: Arrived, status: Status, took_s: float, trace: SpanContext | None, caller: Caller | None
) -> dict[str, object]:
    fields: dict[str, object] = {
        "request_id": arrival.request_id, "model": arrival.model, "status": status.name, "took_ms": round(took_s * 1e3, 3),
    }
    if caller is not None and caller.principal:
        fields["principal"] = caller.principal
    return fields if trace is None else {**fields, "trace_id": trace.trace_id}

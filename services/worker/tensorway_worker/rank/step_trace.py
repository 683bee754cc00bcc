"""Spans of steps: one for each sampled step at the leader, and one for each rank's part of it in a group of several.

    batch (the orchestrator's)
      └ step                the leader: from its start to its end, all ranks included
          ├ rank 0          each rank of a linked group, once for each micro-batch
          └ rank 1 …

The leader's thread that runs a step says which span it is in; the group's commands carry that to the other ranks.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeVar

from tensorway.telemetry.trace_context import from_wire
from tensorway.telemetry.tracing import (
    INTERNAL,
    NO_TRACER,
    SERVER,
    Attribute,
    Span,
    Tracer,
    TraceSettings,
    child_of,
    open_tracer,
    service_resource,
)
from tensorway_worker.rank.launch import RankLaunch

if TYPE_CHECKING:
    from tensorway_worker.rank.step_detail import StepDetail

T = TypeVar("T")
#: A log line names at most so many requests.
_MAX_IDS: Final = 8


class _Current(threading.local):
    """The span of the step that this thread runs, as it goes over the wire; empty: not sampled."""

    wire = ""
    #: What looks into it.
    recording: Any = None


_CURRENT: Final = _Current()


class StepTracing:
    """The spans of one rank."""

    __slots__ = ("_attributes", "_detail", "_is_alone", "_name", "tracer")

    def __init__(
        self, tracer: Tracer, rank: int, attributes: dict[str, Attribute], detail: StepDetail | None = None, *, is_alone: bool = True
    ) -> None:
        """`attributes` say which rank of which group it is; `is_alone`: the leader's step is all that there is of it. `detail` looks into
        what a step does."""
        self.tracer = tracer
        self._detail = detail
        self._is_alone = is_alone
        self._name = f"rank {rank}"
        self._attributes = {**attributes, "tensorway.rank": rank}

    def open(self, traceparent: str) -> Span | None:
        """The leader begins a step under `traceparent`, in this thread; None where it is not sampled. `close` it."""
        if not traceparent or not self.tracer.is_on:
            return None
        parent = from_wire(traceparent)
        if parent is None:
            return None
        span = child_of(parent, "step", 0.0, SERVER, {**self._attributes})
        _CURRENT.wire = span.context.to_wire()
        # In a linked group the leader's own part is a rank's like the others'.
        _CURRENT.recording = self._detail.begin() if self._detail is not None and self._is_alone else None
        return span

    def close(self, span: Span, began_s: float, ended_s: float, received_s: float) -> None:
        """The step that `open` began is over: in the same thread, and in a `finally` where it raised."""
        _CURRENT.wire = ""
        if self._detail is not None:
            self._detail.end(_CURRENT.recording, span)
        span.began_s = began_s
        span.attributes["tensorway.wait_us"] = int((began_s - received_s) * 1e6)
        error = sys.exception()
        if error is not None:
            span.error = f"{type(error).__name__}: {error}"
        self.tracer.record(span, ended_s)

    def part(self, work: Callable[[], T], wire: str) -> Callable[[], T]:
        """`work`, which is this rank's part of a step, with a span where the step is sampled."""
        if not wire or not self.tracer.is_on:
            return work
        parent = from_wire(wire)
        if parent is None:
            return work

        def traced() -> T:
            recording = None if self._detail is None else self._detail.begin()
            span = child_of(parent, self._name, time.monotonic(), INTERNAL, {**self._attributes})
            try:
                return work()
            except Exception as error:
                span.error = f"{type(error).__name__}: {error}"
                raise
            finally:
                ended_s = time.monotonic()
                if self._detail is not None:
                    self._detail.end(recording, span)
                self.tracer.record(span, ended_s)

        return traced


NO_TRACING: Final = StepTracing(NO_TRACER, 0, {})


def step_tracing(launch: RankLaunch, tracer: Tracer) -> StepTracing:
    """What traces the steps of the rank that was launched like this."""
    attributes: dict[str, Attribute] = {
        "tensorway.group": launch.group, "tensorway.model": launch.model, "tensorway.epoch": launch.epoch, "tensorway.node": launch.node,
    }
    detail = None
    if tracer.is_on and launch.trace_step_detail:
        from tensorway_worker.rank.step_detail import StepDetail

        detail = StepDetail(launch.trace_step_detail)
    return StepTracing(tracer, launch.rank, attributes, detail, is_alone=launch.world_size == 1)


def rank_tracer(launch: RankLaunch) -> Tracer:
    """The tracer of a rank; raises like `open_tracer`."""
    settings = TraceSettings(launch.trace_endpoint, 0.0, launch.trace_ca_file, launch.trace_headers_file)
    return open_tracer(settings, service_resource("rank", f"{launch.group}#{launch.epoch}/{launch.rank}", launch.zone))


def current() -> str:
    """The span of the step that this thread runs, for other ranks; empty where it is not sampled."""
    return _CURRENT.wire


def batch_fields(request_ids: Iterable[str], traceparent: str) -> dict[str, object]:
    """What a log line about a whole batch says of it; `traceparent` as the orchestrator wrote it."""
    fields: dict[str, object] = {"request_ids": list(islice(request_ids, _MAX_IDS))}
    context = from_wire(traceparent) if traceparent else None
    return fields if context is None else {**fields, "trace_id": context.trace_id}


def log_fields(request_id: str, traceparent: str = "") -> dict[str, str]:
    """What a log line says of a request; without a `traceparent` it is one of the step that this thread runs."""
    context = from_wire(traceparent or _CURRENT.wire)
    return {"request_id": request_id} if context is None else {"request_id": request_id, "trace_id": context.trace_id}


def step_detail(wire: str, *, replies: bool = False) -> dict[str, Any]:
    """What goes with the command of a step: whether its outcome is the reply, and its span."""
    detail: dict[str, Any] = {"reply": True} if replies else {}
    if wire:
        detail["trace"] = wire
    return detail

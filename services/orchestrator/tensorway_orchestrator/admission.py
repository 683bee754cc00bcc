"""The yes or no of the orchestrator: whether a request may join its lane's queue. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tensorway.errors import DeadlineExceeded, InvalidRequest, Overloaded, TensorwayError, Unavailable
from tensorway.signature import RevisionSpec
from tensorway_orchestrator.batching import BatchLimits
from tensorway_orchestrator.requests import Request

_MIN_RETRY_AFTER_S: Final = 0.05


@dataclass(slots=True)
class HeldBytes:
    """Tensor bytes of all open requests of this orchestrator."""

    limit: int
    total: int = 0

    def can_hold(self, num_bytes: int) -> bool:
        """A request larger than the whole budget runs when it is alone: refusing it for ever would be no matter of load."""
        return not self.total or self.total + num_bytes <= self.limit


@dataclass(frozen=True, slots=True)
class LaneLoad:
    """What a lane knows when a request arrives."""

    queued_rows: int
    held: HeldBytes
    #: True while no group lives and requests have waited long enough for one.
    is_given_up: bool
    #: Predicted time of a full step; 0 while nothing is measured.
    step_s: float
    #: When this request would be answered; None where it is the next, or too little is measured to say.
    finish_s: float | None


def refusal(request: Request, spec: RevisionSpec, limits: BatchLimits, load: LaneLoad, now_s: float) -> TensorwayError | None:
    """Why the request may not join; None where it may."""
    if request.deadline_s <= now_s:
        return DeadlineExceeded(f"the deadline of request {request.request_id!r} had passed on arrival", hop="orchestrator")
    if request.rows > limits.max_rows and spec.signature.is_batchable and spec.batching.oversize == "refuse":
        return InvalidRequest(
            f"the request has {request.rows} rows, model {spec.model!r} takes at most {limits.max_rows}; send several requests",
            field="inputs",
        )
    if load.is_given_up:
        return no_group(spec)
    if load.queued_rows + request.weight > spec.batching.max_queue_rows:
        return Overloaded(
            f"the queue of model {spec.model!r} is full: {load.queued_rows} of {spec.batching.max_queue_rows} rows wait",
            retry_after_s=max(_MIN_RETRY_AFTER_S, load.queued_rows / limits.max_rows * load.step_s),
        )
    if not load.held.can_hold(request.num_bytes):
        return Overloaded(
            f"this orchestrator holds {load.held.total} of {load.held.limit} tensor bytes; the request has {request.num_bytes}",
            retry_after_s=max(_MIN_RETRY_AFTER_S, load.step_s),
        )
    return _doomed(request, spec, load, now_s)


def no_group(spec: RevisionSpec) -> Unavailable:
    """What requests are told while no group of their model lives."""
    return Unavailable(f"no group serves model {spec.model!r} now; `tensorway models` says why", retry_after_s=1.0)


def _doomed(request: Request, spec: RevisionSpec, load: LaneLoad, now_s: float) -> TensorwayError | None:
    """A request whose predicted finish is past its deadline is refused before it costs anything."""
    finish_s = load.finish_s
    return None if finish_s is None or finish_s <= request.deadline_s else doomed(request, spec, finish_s, now_s)


def doomed(request: Request, spec: RevisionSpec, finish_s: float, now_s: float) -> DeadlineExceeded:
    """What a request is told that would be answered at `finish_s`, too late."""
    return DeadlineExceeded(
        f"model {spec.model!r} would answer in {finish_s - now_s:.3f} s, the deadline is in {request.deadline_s - now_s:.3f} s",
        hop="orchestrator", retry_after_s=max(_MIN_RETRY_AFTER_S, finish_s - request.deadline_s),
    )

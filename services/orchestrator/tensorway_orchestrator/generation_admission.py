"""The yes or no to a new stream. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tensorway.errors import DeadlineExceeded, Overloaded, TensorwayError
from tensorway.signature import RevisionSpec
from tensorway_orchestrator.admission import HeldBytes, no_group
from tensorway_orchestrator.streams import Generation

_MIN_RETRY_AFTER_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class GenerationLoad:
    """What a lane knows when a stream arrives."""

    #: Choices that could leave at once.
    num_free: int
    #: Choices that wait, and how many may.
    num_waiting: int
    max_waiting: int
    #: Places of all groups that live, free or taken.
    num_places: int
    #: Mean time of a choice on a group.
    attempt_s: float
    held: HeldBytes
    #: True while no group lives and streams have waited long enough for one.
    is_given_up: bool


def refusal(generation: Generation, deadline_s: float, spec: RevisionSpec, load: GenerationLoad, now_s: float) -> TensorwayError | None:
    """Why the stream may not begin; None where it may. One that the mesh has begun already is never refused for load: it was admitted."""
    if deadline_s <= now_s:
        return DeadlineExceeded(f"the deadline of request {generation.request_id!r} had passed on arrival", hop="orchestrator")
    if generation.so_far:
        return None
    if load.is_given_up:
        return no_group(spec)
    retry_after_s = max(_MIN_RETRY_AFTER_S, load.attempt_s * (load.num_waiting + 1) / max(1, load.num_places))
    num_queued = load.num_waiting + max(0, generation.num_choices - load.num_free)
    if num_queued > load.max_waiting and num_queued > load.num_waiting:
        return Overloaded(
            f"model {spec.model!r} has no place for {generation.num_choices} more answers: {load.num_waiting} of {load.max_waiting} wait",
            retry_after_s=retry_after_s,
        )
    if not load.held.can_hold(len(generation.head)):
        return Overloaded(
            f"this orchestrator holds {load.held.total} of {load.held.limit} bytes; the request has {len(generation.head)}",
            retry_after_s=retry_after_s,
        )
    return None

"""When a batch leaves and what may be in it. Pure.

Work-conserving: if a group is idle, what is there goes now. While a group runs one batch, the next is held back for as long as the measured
step time allows, so that it can still grow, and leaves early once it is full. `max_delay_ms` above 0 is the author's wish to wait.
"""

from __future__ import annotations

from dataclasses import dataclass

from tensorway.signature import ROWS, Batching, RevisionSpec, Signature


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one batch of a revision may hold."""

    max_rows: int
    max_bytes: int
    max_requests: int
    max_delay_s: float

    @classmethod
    def of(cls, spec: RevisionSpec, max_bytes: int) -> BatchLimits:
        """A model that cannot be batched gets one request a step."""
        batching: Batching = spec.batching
        max_requests = batching.max_rows if spec.signature.is_batchable else 1
        return cls(batching.max_rows, max_bytes, max_requests, batching.max_delay_ms / 1e3)


@dataclass(frozen=True, slots=True)
class ShapeRule:
    """Which extents of which inputs must agree within a batch: those that vary and have no padding rule."""

    #: (input name, dimension index)
    dimensions: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, signature: Signature, batching: Batching) -> ShapeRule:
        padded = {padding.input for padding in batching.padding}
        return cls(tuple(
            (spec.name, index)
            for spec in signature.inputs
            if spec.name not in padded
            for index, extent in enumerate(spec.shape)
            if isinstance(extent, str) and extent != ROWS
        ))

    def shape_key(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The extents by which requests are kept apart; -1 where an input is missing or too short (the leader will say so)."""
        return tuple(
            shapes[name][index] if name in shapes and index < len(shapes[name]) else -1 for name, index in self.dimensions
        )


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """One group as seen when a batch could leave."""

    #: Batches sent and not answered.
    num_in_flight: int
    #: Predicted end of the running batch, on the monotonic clock; meaningless while idle.
    predicted_idle_s: float
    #: How long a batch is on its way before the group could start it, seconds.
    lead_s: float


def leave_at_s(limits: BatchLimits, queued_rows: int, oldest_arrival_s: float, load: GroupLoad, now_s: float) -> float:
    """The instant at which the queue's next batch should leave for this group: `now_s` or before means at once."""
    if queued_rows >= limits.max_rows or limits.max_requests == 1:
        return now_s
    wanted_s = oldest_arrival_s + limits.max_delay_s
    if load.num_in_flight == 0:
        return wanted_s
    return max(wanted_s, load.predicted_idle_s - load.lead_s)

"""Which group takes the next batch: the one predicted to finish it first. Pure.

A few random choices are compared (Mitzenmacher, "The power of two choices in randomized load balancing", 2001), as many among the idle
groups as among the busy ones: an idle group is known to be idle, so chance need not find it (Lu et al., "Join-Idle-Queue", 2011).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tensorway_orchestrator.step_times import StepTimes

if TYPE_CHECKING:
    from tensorway_orchestrator.group_record import GroupRecord
    from tensorway_orchestrator.routing_policy import RoutingPolicy
    from tensorway_orchestrator.urn import Urn

#: One running, one waiting at the leader: the group never idles on the network.
MAX_BATCHES_IN_FLIGHT: Final = 2
_COMPARE_ALL_UP_TO: Final = 8
#: Steps measured before a prediction may refuse a request.
_MIN_SAMPLES: Final = 10




@dataclass(slots=True, eq=False)
class Zone:
    """The groups with room of one zone, or of all other zones."""

    idle: Urn[GroupRecord]
    busy: Urn[GroupRecord]

    def __len__(self) -> int:
        return len(self.idle) + len(self.busy)


def soonest(
    own: Zone, others: Zone, rows: int, avoid: Collection[str], now_s: float, policy: RoutingPolicy, pick: Callable[[int], int]
) -> GroupRecord | None:
    """The group predicted to finish a batch of `rows` first, among a few drawn at random; None where no group outside `avoid` has room.

    A group of another zone must be earlier by `cross_zone_s` and `cross_zone_share`. `pick(n)` returns a random integer below n.
    """
    best, best_s = _soonest(own, rows, avoid, now_s, policy.num_draws, pick)
    if len(others):
        other, other_s = _soonest(others, rows, avoid, now_s, policy.num_draws, pick)
        if other is not None and (best is None or other_s * (1.0 + policy.cross_zone_share) + policy.cross_zone_s < best_s):
            return other
    return best


def _soonest(
    zone: Zone, rows: int, avoid: Collection[str], now_s: float, num_draws: int, pick: Callable[[int], int]
) -> tuple[GroupRecord | None, float]:
    best: GroupRecord | None = None
    best_s = float("inf")
    for urn in (zone.idle, zone.busy):
        # So many more that those to avoid may all be among them.
        for record in urn.draw(num_draws + len(avoid), pick):
            if avoid and record.id in avoid:
                continue
            cost_s = record.cost_s(rows, now_s)
            # Among equals the less loaded wins, then the one drawn first, so that unmeasured groups share the first batches.
            if best is None or cost_s < best_s or (cost_s == best_s and len(record.in_flight) < len(best.in_flight)):
                best, best_s = record, cost_s
    return best, best_s


@dataclass(frozen=True, slots=True)
class Candidate:
    """A group as the router sees it."""

    id: str
    num_in_flight: int
    #: When all that it has been sent is predicted to be done, on the monotonic clock.
    predicted_idle_s: float
    step_times: StepTimes

    def predicted_finish_s(self, rows: int, now_s: float) -> float:
        return max(now_s, self.predicted_idle_s) + self.step_times.predict_s(rows)


def choose(
    candidates: Sequence[Candidate], rows: int, avoid: frozenset[str], now_s: float, pick: Callable[[int], int]
) -> Candidate | None:
    """The best candidate with room, or None. Groups in `avoid` are taken only where there is no other.

    `pick(n)` returns a random integer below n.
    """
    free = [candidate for candidate in candidates if candidate.num_in_flight < MAX_BATCHES_IN_FLIGHT]
    preferred = [candidate for candidate in free if candidate.id not in avoid] or free
    if len(preferred) > _COMPARE_ALL_UP_TO:
        preferred = [preferred[pick(len(preferred))], preferred[pick(len(preferred))]]
    # Among equals the less loaded wins, then a random one, so that unmeasured groups share the first requests.
    return min(
        preferred, key=lambda c: (c.predicted_finish_s(rows, now_s), c.num_in_flight, pick(1 << 16)), default=None
    )


def predict_finish_s(candidates: Sequence[Candidate], queued_rows: int, rows: int, max_rows: int, now_s: float) -> float | None:
    """When a request of `rows` that joins behind `queued_rows` rows would be answered; None while too little is measured to say."""
    if not candidates or min(candidate.step_times.num_samples for candidate in candidates) < _MIN_SAMPLES:
        return None
    first = min(candidates, key=lambda candidate: candidate.predicted_idle_s)
    num_full_batches = queued_rows // max_rows
    waiting_s = num_full_batches * first.step_times.predict_s(max_rows) / len(candidates)
    return max(now_s, first.predicted_idle_s) + waiting_s + first.step_times.predict_s(rows)

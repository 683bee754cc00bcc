"""Which group takes the next batch: the one predicted to finish it first. Pure.

A few random choices are compared (Mitzenmacher, "The power of two choices in randomized load balancing", 2001), as many among the idle
groups as among the busy ones: an idle group is known to be idle, so chance need not find it (Lu et al., "Join-Idle-Queue", 2011).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tensorway_orchestrator.group_record import GroupRecord
    from tensorway_orchestrator.routing_policy import RoutingPolicy
    from tensorway_orchestrator.urn import Urn

#: One running, one waiting at the leader: the group never idles on the network.
MAX_BATCHES_IN_FLIGHT: Final = 2


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

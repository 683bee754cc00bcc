"""Which group takes the next batch: the one predicted to finish it first. Pure.

Two random choices are compared where there are many groups (Mitzenmacher, "The power of two choices in randomized load balancing", 2001);
all of them where there are few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tensorway_orchestrator.step_times import StepTimes

#: One running, one waiting at the leader: the group never idles on the network.
MAX_BATCHES_IN_FLIGHT: Final = 2
_COMPARE_ALL_UP_TO: Final = 8
#: Steps measured before a prediction may refuse a request.
_MIN_SAMPLES: Final = 10


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

"""How many replicas of a model there should be. Pure.

Up at once, for a queue grows with every second; down slowly, for a replica that was ended too early costs its loading again: the shape of
Kubernetes' horizontal autoscaler with its tolerance and stabilisation window, with the need predicted instead of a metric's ratio.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tensorway.loads import ModelLoad
from tensorway.resilience import Scaling

#: So much more than what the replicas do for their target is no reason for another, and so much less than one fewer would do for theirs
#: is none to end one. Between the two lies what keeps a steady load from flapping.
_TOLERANCE: Final = 0.1
#: An orchestrator's word is this old at most before it tells of a request, seconds.
ACTIVE_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What all orchestrators together want of one model."""

    #: Sum of the predicted needs, replicas.
    need: float
    #: Whether a request waits, or has come while no replica was wanted.
    is_called: bool
    #: Seconds since the last request anywhere; infinite where no orchestrator knows the model.
    idle_s: float


def demand_of(loads: Iterable[tuple[ModelLoad, float]]) -> Demand:
    """The sum over orchestrators of their last words about one model, each with its age in seconds.

    A model that was active when an orchestrator last spoke is so until it says otherwise: it speaks when that changes.
    """
    need, is_called, idle_s = 0.0, False, math.inf
    for load, age_s in loads:
        need += load.predicted_replicas
        is_called = is_called or load.is_called or load.num_open > 0
        idle_s = min(idle_s, 0.0 if load.idle_s < ACTIVE_S else load.idle_s + max(0.0, age_s))
    return Demand(need, is_called, idle_s)


@dataclass(slots=True)
class Scale:
    """The number of replicas of one model, decided from time to time. `now_s` is the monotonic clock."""

    rule: Scaling
    #: Since when somebody decides here; what was before is not known.
    since_s: float
    _current: int = -1
    #: Since when any replica has served.
    _ready_since_s: float = math.inf
    #: Since when one replica fewer would have done.
    _calm_since_s: float = math.inf

    def decide(self, demand: Demand, current: int, num_ready: int, now_s: float) -> int:
        """The wanted number, within the rule's bounds.

        Args:
            current: wanted now.
            num_ready: serving now; more are starting, or cannot.
        """
        rule = self.rule
        if current != self._current:
            self._current, self._calm_since_s = current, math.inf
        lowest, highest = rule.min_replicas, rule.max_replicas
        if not lowest <= current <= highest:
            return self._chosen(max(lowest, min(highest, current)))
        self._ready_since_s = min(self._ready_since_s, now_s) if num_ready else math.inf
        # What is still starting has had no chance to be idle.
        idle_s = min(demand.idle_s, now_s - max(self.since_s, self._ready_since_s))
        if current == 0:
            return self._chosen(1 if demand.is_called else 0)
        if demand.is_called:
            idle_s = 0.0
        if idle_s >= rule.idle_s:
            return self._chosen(lowest)
        wanted = math.ceil(demand.need / (1.0 + _TOLERANCE))
        if wanted > current:
            # While new ones start, the queue grows and says nothing about how many are enough.
            most = max(2 * num_ready, num_ready + 2)
            return self._chosen(max(current, min(wanted, most, highest)))
        return self._chosen(self._calmed(demand.need, current, num_ready, now_s))

    def _calmed(self, need: float, current: int, num_ready: int, now_s: float) -> int:
        """One fewer after `idle_s` in which all served and one fewer would have done; never the last, which ends without requests only."""
        fewer = current - 1
        if num_ready < current or fewer < max(1, self.rule.min_replicas) or need > fewer * (1.0 - _TOLERANCE):
            self._calm_since_s = math.inf
            return current
        self._calm_since_s = min(self._calm_since_s, now_s)
        return fewer if now_s - self._calm_since_s >= self.rule.idle_s else current

    def _chosen(self, wanted: int) -> int:
        if wanted != self._current:
            self._calm_since_s = math.inf
        return wanted

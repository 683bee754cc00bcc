"""Whether a group may have batches: one state machine for ejection and circuit breaking. Pure.

    serving ──failures, or slowness──▶ ejected ──back-off over──▶ probing ──probe answered──▶ serving, through slow start
                                          ▲                          │
                                          └──────probe failed────────┘   (a longer back-off)

A batch that was sent before the last change of state says nothing about the new one. What was in flight together when a group failed failed
for one reason, and counts once. The model's own errors are answers, and never come here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from tensorway_orchestrator.routing_policy import EjectionPolicy


class State(StrEnum):
    """Where a group stands."""

    SERVING = "serving"
    #: Gets nothing until its back-off is over.
    EJECTED = "ejected"
    #: Gets one batch at a time, until one is answered.
    PROBING = "probing"


class Failure(StrEnum):
    """What became of a batch, where the group is to blame."""

    #: The link broke, or could not take it.
    LOST = "lost"
    #: No answer in time.
    TIMEOUT = "timeout"


class Reason(StrEnum):
    """Why a group was ejected."""

    FAILURES = "failures"
    FAILURE_SHARE = "failure_share"
    SLOWNESS = "slowness"
    PROBE = "probe"


@dataclass(slots=True)
class Standing:
    """Of one group. What is due is returned as a `Reason`; whether it is done (`eject`) is up to the roster, which knows the others."""

    policy: EjectionPolicy
    state: State = State.SERVING
    #: The last change of state, on the monotonic clock.
    since_s: float = -math.inf
    #: While ejected: when the back-off is over.
    back_s: float = 0.0
    #: Failures in a row.
    num_failures: int = 0
    #: Mean of how many times as long as the others' its steps take; 1 is like the others.
    slowness: float = 1.0
    #: Ejections in a row.
    level: int = 0
    _last_failure_s: float = -math.inf
    _num_slow_samples: int = 0
    #: Outcomes and failures, decaying with the window.
    _outcomes: float = 0.0
    _failed: float = 0.0
    _counted_s: float = 0.0

    def failed(self, sent_s: float, now_s: float) -> Reason | None:
        """A batch sent at `sent_s` came to nothing. Returns why the group should be ejected, if it should."""
        if sent_s < self.since_s or self.state is State.EJECTED or sent_s < self._last_failure_s:
            return None
        self._last_failure_s = now_s
        if self.state is State.PROBING:
            return Reason.PROBE
        self.num_failures += 1
        self._count(now_s, 1.0)
        if self.num_failures >= self.policy.max_failures:
            return Reason.FAILURES
        if self._outcomes >= self.policy.min_outcomes and self._failed > self.policy.max_failure_share * self._outcomes:
            return Reason.FAILURE_SHARE
        return None

    def answered(self, sent_s: float, now_s: float) -> bool:
        """A batch sent at `sent_s` was answered. True where that was a probe, and the group should be admitted."""
        if self.state is State.SERVING:
            self.num_failures = 0
            self._count(now_s, 0.0)
        return self.is_probe(sent_s)

    def is_probe(self, sent_s: float) -> bool:
        """Whether a batch sent at `sent_s` is a probe."""
        return self.state is State.PROBING and sent_s >= self.since_s

    def measured(self, ratio: float, others_slowness: float, sent_s: float, *, is_warming: bool) -> Reason | None:
        """A step took `ratio` times what others' steps of as many rows took. Returns why the group should be ejected, if it should.

        `others_slowness`: the mean of the others'. Where they have all become slow, the reason is what they are sent, or a machine that
        they share. `is_warming`: the group has just come, and its first steps are expected to be slow.
        """
        policy = self.policy
        limit = policy.slow_factor * max(1.0, others_slowness)
        if sent_s < self.since_s or self.state is State.EJECTED:
            return None
        if self.state is State.PROBING:
            return Reason.PROBE if ratio > limit else None
        if is_warming:
            return None
        self._num_slow_samples += 1
        self.slowness += policy.slow_weight * (min(ratio, 2.0 * policy.slow_factor) - self.slowness)
        is_slow = self.slowness > limit and self._num_slow_samples >= policy.min_slow_samples
        return Reason.SLOWNESS if is_slow else None

    def eject(self, draw: float, now_s: float) -> None:
        """Leaves the group out for a while; `draw` is uniform in 0 to 1."""
        policy = self.policy
        if self.state is State.SERVING and now_s - self.since_s > policy.forgive_after_s:
            self.level = 0
        back_off_s = min(policy.max_back_off_s, policy.first_back_off_s * 2.0 ** min(self.level, 30))
        self.level += 1
        self.state, self.since_s, self.back_s = State.EJECTED, now_s, now_s + back_off_s * (0.5 + 0.5 * draw)

    def probe(self, now_s: float) -> None:
        """The back-off is over."""
        self.state, self.since_s = State.PROBING, now_s

    def admit(self, now_s: float) -> None:
        """The group serves again, and its past is forgotten but for the number of ejections."""
        self.state, self.since_s = State.SERVING, now_s
        self.num_failures = self._num_slow_samples = 0
        self.slowness = 1.0
        self._outcomes = self._failed = 0.0

    def _count(self, now_s: float, failures: float) -> None:
        kept = math.exp((self._counted_s - now_s) / self.policy.failure_window_s)
        self._counted_s = now_s
        self._outcomes = self._outcomes * kept + 1.0
        self._failed = self._failed * kept + failures

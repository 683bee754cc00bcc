"""When a request that is late is sent to a second group, too. Pure.

The delay is a quantile of what recent attempts took, so that few requests are hedged, and a budget bounds hedges to a share of requests:
when all are late at once, the mesh is overloaded and a second copy of everything would make it worse (Dean and Barroso, "The tail at
scale", Communications of the ACM, 2013).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from tensorway.resilience import Hedging

#: Buckets of a histogram of durations: from 50 µs up, each 10 % wider than the one before; the last holds all above 1 000 s.
_FIRST_S: Final = 50e-6
_GROWTH: Final = math.log(1.1)
_NUM_BUCKETS: Final = 178
#: Old attempts count half once so many new ones came.
_HALF_LIFE: Final = 2048
#: Attempts seen before a quantile means anything, and between two looks at it.
_MIN_SAMPLES: Final = 100
_LOOK_EVERY: Final = 64
#: Hedges that may come at once after a quiet time.
_MAX_BUDGET: Final = 10.0


@dataclass(slots=True)
class AttemptTimes:
    """A quantile of how long recent attempts took."""

    quantile: float
    num_samples: int = 0
    _counts: list[float] = field(default_factory=lambda: [0.0] * _NUM_BUCKETS)
    _value_s: float | None = None

    def observe(self, took_s: float) -> None:
        """An attempt was answered."""
        bucket = 0 if took_s <= _FIRST_S else min(_NUM_BUCKETS - 1, 1 + int(math.log(took_s / _FIRST_S) / _GROWTH))
        self._counts[bucket] += 1.0
        self.num_samples += 1
        if self.num_samples % _HALF_LIFE == 0:
            self._counts = [count / 2.0 for count in self._counts]
        if self.num_samples % _LOOK_EVERY == 0:
            self._value_s = None

    @property
    def value_s(self) -> float | None:
        """The quantile, at most 10 % too long; None while too little was seen."""
        if self.num_samples < _MIN_SAMPLES:
            return None
        if self._value_s is None:
            wanted, seen = self.quantile * sum(self._counts), 0.0
            for bucket, number in enumerate(self._counts):
                seen += number
                if seen >= wanted:
                    self._value_s = _FIRST_S * math.exp(_GROWTH * bucket)
                    break
        return self._value_s


@dataclass(slots=True)
class Hedger:
    """Decides for one revision."""

    rule: Hedging
    times: AttemptTimes = field(init=False)
    _budget: float = 0.0

    def __post_init__(self) -> None:
        self.times = AttemptTimes(self.rule.quantile)

    def arrived(self) -> None:
        """A request has come."""
        self._budget = min(_MAX_BUDGET, self._budget + self.rule.max_share)

    def delay_s(self) -> float | None:
        """How long an attempt may take before it is late, seconds; None while that is unknown."""
        value_s = self.times.value_s
        return None if value_s is None else max(self.rule.min_delay_ms / 1e3, value_s)

    def withdraw(self) -> bool:
        """Takes one hedge; False where none is left."""
        if self._budget < 1.0:
            return False
        self._budget -= 1.0
        return True

"""When a request that arrives now would be answered, as far as one may promise: what admission compares with its deadline. Pure.

The roster predicts from what is ahead of the request. Two things are added here, each learned for every priority:

- What will come ahead of it meanwhile. While `r` rows a second of higher priority arrive, groups that serve `m` rows a second work off what
  is ahead at `m - r` (Cobham, "Priority assignment in waiting line problems", 1954).
- How wrong predictions have been. Under overload the queue grows until predictions reach the deadlines, so every admitted request is a
  close call: without a margin half of them would be late, and what is late waited, or was served, for nothing. The margin is a quantile of
  (answered minus predicted), followed by stochastic approximation (Robbins and Monro, 1951).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from tensorway_orchestrator.roster import Roster

#: What was admitted so long ago counts a third, seconds.
_WINDOW_S: Final = 2.0
#: Share of answers that may be later than promised, and how far one answer moves the margin, as a share of a full step.
_LATE_SHARE: Final = 0.1
_GAIN: Final = 0.01
#: The margin is at most so many full steps.
_MAX_MARGIN_STEPS: Final = 4.0


@dataclass(frozen=True, slots=True)
class Promise:
    """What was predicted for one request on its arrival."""

    priority: int
    #: When it would be answered, margin included, on the monotonic clock.
    finish_s: float
    #: Whether a margin belongs to it: full batches are ahead of it. Without them the request joins the next batch, and a margin would only
    #: make that batch smaller.
    has_margin: bool


@dataclass(slots=True, eq=False)
class Outlook:
    """Of one lane. Priorities are few."""

    roster: Roster
    #: Rows admitted lately, by priority, as they were worth at `_decayed_s`.
    _admitted: dict[int, float] = field(default_factory=dict)
    _decayed_s: float = -math.inf
    _since_s: float = math.inf
    #: Seconds, by priority.
    _margins_s: dict[int, float] = field(default_factory=dict)

    def promise(self, rows_ahead: int, rows: int, priority: int, now_s: float) -> Promise | None:
        """When a request of `rows` behind `rows_ahead` rows would be answered; None while too little is measured to say.

        `rows_ahead` are those of its own priority and above.
        """
        finish_s = self.roster.predict_finish_s(rows_ahead, rows, now_s, self.overtaking_per_s(priority, now_s))
        if finish_s is None:
            return None
        has_margin = rows_ahead >= self.roster.max_rows
        return Promise(priority, finish_s + self._margins_s.get(priority, 0.0) if has_margin else finish_s, has_margin)

    def admitted(self, priority: int, rows: int, now_s: float) -> None:
        """A request has joined the queue."""
        if now_s > self._decayed_s:
            kept = math.exp((self._decayed_s - now_s) / _WINDOW_S)
            self._admitted = {level: left for level, worth in self._admitted.items() if (left := worth * kept) > 1e-6}
            self._decayed_s = now_s
            self._since_s = min(self._since_s, now_s)
        self._admitted[priority] = self._admitted.get(priority, 0.0) + rows

    def answered(self, promise: Promise, now_s: float) -> None:
        """The request was answered now."""
        self._learn(promise, is_late=now_s > promise.finish_s)

    def missed(self, promise: Promise) -> None:
        """The admitted request was not answered in time, or given up because it could not be."""
        self._learn(promise, is_late=True)

    def overtaking_per_s(self, priority: int, now_s: float) -> float:
        """Rows a second that will come ahead of a request of `priority`, if things go on as lately."""
        higher = sum(worth for level, worth in self._admitted.items() if level > priority)
        if not higher:
            return 0.0
        # The window fills while the first requests come.
        filled_s = _WINDOW_S * -math.expm1(-max(0.1, now_s - self._since_s) / _WINDOW_S)
        return higher * math.exp((self._decayed_s - now_s) / _WINDOW_S) / filled_s

    def _learn(self, promise: Promise, *, is_late: bool) -> None:
        if promise.has_margin:
            full_s = self.roster.forecast.typical.predict_s(self.roster.max_rows)
            moved_s = self._margins_s.get(promise.priority, 0.0) + _GAIN * full_s * (1.0 - _LATE_SHARE if is_late else -_LATE_SHARE)
            self._margins_s[promise.priority] = min(max(0.0, moved_s), _MAX_MARGIN_STEPS * full_s)

"""Whether a lost attempt is tried again, and when. Pure.

A budget bounds retries to a share of recent requests, so that an outage is not answered with a storm (Finagle's RetryBudget: deposits per
request, withdrawals per retry, and a slow trickle for services with little traffic). Pauses grow exponentially with full jitter (Brooker,
"Exponential backoff and jitter", 2015).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from tensorway.errors import TensorwayError

#: An empty budget is back at `min_budget` after so long without any request.
_REFILL_S: Final = 10.0
_FIRST_PAUSE_S: Final = 0.01
_LONGEST_PAUSE_S: Final = 1.0
#: An attempt that has taken so many times what was predicted, and so long, counts as stuck.
_STUCK_FACTOR: Final = 10.0
_STUCK_AFTER_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a request is tried, and how much of the load retries may be."""

    max_attempts: int = 3
    #: Retries allowed per request seen.
    budget_share: float = 0.2
    #: Retries allowed however few requests there were.
    min_budget: float = 20.0
    max_budget: float = 1000.0

    def covering(self, num_lost: int) -> RetryPolicy:
        """The same, where so many requests may be lost at once, twice, and that is no storm: all that one group has."""
        bound = 2.0 * num_lost
        return replace(self, min_budget=max(self.min_budget, bound), max_budget=max(self.max_budget, bound))


@dataclass(slots=True)
class RetryBudget:
    """Counts what is left; one per revision."""

    policy: RetryPolicy
    balance: float = 0.0
    _refilled_s: float = 0.0

    def __post_init__(self) -> None:
        self.balance = self.policy.min_budget

    def deposit(self) -> None:
        """A request has arrived."""
        self.balance = min(self.policy.max_budget, self.balance + self.policy.budget_share)

    def withdraw(self, now_s: float) -> bool:
        """Takes one retry; False where none is left."""
        missing = self.policy.min_budget - self.balance
        if missing > 0.0:
            self.balance += min(missing, self.policy.min_budget * max(0.0, now_s - self._refilled_s) / _REFILL_S)
        self._refilled_s = now_s
        if self.balance < 1.0:
            return False
        self.balance -= 1.0
        return True


def should_retry(
    error: TensorwayError, num_lost: int, deadline_s: float, now_s: float, policy: RetryPolicy, budget: RetryBudget
) -> bool:
    """True where another attempt may help, is in time, and the budget pays for it. `num_lost` attempts came to nothing, this one included.
    Withdraws from the budget."""
    if not error.is_retryable or num_lost >= policy.max_attempts or deadline_s <= now_s:
        return False
    return budget.withdraw(now_s)


def pause_s(num_lost: int, draw: float) -> float:
    """How long what was lost `num_lost` times waits before it is sent again, seconds; `draw` is uniform in 0 to 1."""
    return draw * min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 4.0 ** (num_lost - 1))


def stuck_after_s(predicted_s: float) -> float:
    """How long an attempt that was predicted to take `predicted_s` may take before the group counts as stuck, seconds."""
    return max(_STUCK_AFTER_S, _STUCK_FACTOR * predicted_s)

"""Whether a lost attempt is tried again. Pure.

A budget bounds retries to a share of recent requests, so that an outage is not answered with a storm (Finagle's RetryBudget: deposits per
request, withdrawals per retry).
"""

from __future__ import annotations

from dataclasses import dataclass

from tensorway.errors import TensorwayError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a request is tried, and how much of the load retries may be."""

    max_attempts: int = 3
    #: Retries allowed per request seen.
    budget_share: float = 0.2
    #: Retries allowed however few requests there were.
    min_budget: float = 20.0
    max_budget: float = 1000.0


@dataclass(slots=True)
class RetryBudget:
    """Counts what is left; one per revision."""

    policy: RetryPolicy
    balance: float = 0.0

    def __post_init__(self) -> None:
        self.balance = self.policy.min_budget

    def deposit(self) -> None:
        """A request has arrived."""
        self.balance = min(self.policy.max_budget, self.balance + self.policy.budget_share)

    def withdraw(self) -> bool:
        """Takes one retry; False where none is left."""
        if self.balance < 1.0:
            return False
        self.balance -= 1.0
        return True


def should_retry(
    error: TensorwayError, num_attempts: int, deadline_s: float, now_s: float, policy: RetryPolicy, budget: RetryBudget
) -> bool:
    """True where another attempt may help, is in time, and the budget pays for it. Withdraws from the budget."""
    if not error.is_retryable or num_attempts >= policy.max_attempts or deadline_s <= now_s:
        return False
    return budget.withdraw()

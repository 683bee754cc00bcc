"""Whether a choice whose group was lost is continued elsewhere. Pure.

An attempt that brought tokens costs nothing: a long answer may outlive many groups. Attempts that brought none are counted, and paid from
the retry budget. A choice on which two groups died, one after the other, without a token in between, is taken for what killed them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tensorway.errors import ModelFailed, TensorwayError
from tensorway_orchestrator.retry import RetryBudget, RetryPolicy, should_retry

#: Groups that one choice may take with it.
_MAX_DEATHS: Final = 2
_FIRST_REST_S: Final = 0.05
_LONGEST_REST_S: Final = 1.0


@dataclass(slots=True)
class Record:
    """How the attempts of one choice went."""

    #: Attempts of all kinds, those of other orchestrators counted as one.
    num_attempts: int = 0
    #: Attempts without a token since the last one with.
    num_fruitless: int = 0
    #: Groups that were lost meanwhile.
    lost_on: tuple[str, ...] = ()
    #: Those of them that died.
    died: tuple[str, ...] = ()

    def progressed(self) -> None:
        """A token has come."""
        self.num_fruitless = 0
        self.lost_on = self.died = ()

    @property
    def rest_s(self) -> float:
        """How long a leader that lives but says UNAVAILABLE is left alone, so that attempts are not spent within milliseconds."""
        return min(_LONGEST_REST_S, _FIRST_REST_S * 2.0**self.num_fruitless)


@dataclass(frozen=True, slots=True)
class Loss:
    """An attempt that ended with an error."""

    group: str
    error: TensorwayError
    #: Whether the group's link broke, unannounced.
    is_death: bool
    #: Whether the attempt had brought a token.
    has_progressed: bool


def verdict(
    record: Record, loss: Loss, deadline_s: float, now_s: float, policy: RetryPolicy, budget: RetryBudget
) -> TensorwayError | None:
    """None where another attempt follows, else the error that ends the stream. Notes the loss in `record`."""
    record.lost_on = (*record.lost_on, loss.group)
    if loss.has_progressed:
        return None if loss.error.is_retryable and now_s < deadline_s else loss.error
    record.num_fruitless += 1
    if loss.is_death and loss.group not in record.died:
        record.died = (*record.died, loss.group)
    if len(record.died) >= _MAX_DEATHS:
        return ModelFailed(
            f"groups {' and '.join(record.died)} died on this request, one after the other, before it had another token; it is not tried "
            "again. The groups' logs say why they died"
        )
    return None if should_retry(loss.error, record.num_fruitless, deadline_s, now_s, policy, budget) else loss.error

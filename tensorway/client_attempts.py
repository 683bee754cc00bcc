"""The attempts of one call of the Python client."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from tensorway.deadline import Deadline
from tensorway.errors import TensorwayError

_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 2.0


@dataclass(slots=True)
class Attempts:
    """How many are left, and how long to pause before the next."""

    deadline: Deadline
    num_left: int
    num_failed: int = 0
    #: Other endpoints that can be asked: the first attempts after a loss go there, and need no pause.
    num_spares: int = 0

    def pause_s(self, error: TensorwayError) -> float:
        """Seconds to wait before the next attempt. Raises `error` where there is none: not curable, no attempt or no time left."""
        pause_s: float = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self.num_failed) * random.uniform(0.5, 1.0)
        if self.num_failed < self.num_spares:
            pause_s = 0.0
        pause_s = max(pause_s, error.retry_after_s)
        if not error.is_retryable or self.num_left == 0 or self.deadline.remaining_s() <= pause_s:
            raise error
        self.num_left -= 1
        self.num_failed += 1
        return pause_s

    def renew(self) -> None:
        """The last attempt got somewhere: what failed before it counts no more."""
        self.num_left += self.num_failed
        self.num_failed = 0

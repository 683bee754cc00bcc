"""The requests that failed last, for a person who looks: never what they carried, nor who sent them."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Final

from tensorway.errors import TensorwayError

_NUM_KEPT: Final = 50
_MAX_CHARS: Final = 300


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """One of them."""

    #: Seconds since 1970.
    unix_s: float
    #: Empty where it named no known model: what callers make up is not shown.
    model: str
    #: Name of the gRPC status.
    code: str
    sentence: str
    request_id: str


class RecentErrors:
    """The last fifty. Costs nothing while requests succeed."""

    def __init__(self, num_kept: int = _NUM_KEPT) -> None:
        self._kept: deque[FailedRequest] = deque(maxlen=num_kept)

    def add(self, model: str, request_id: str, error: TensorwayError) -> None:
        """One more; the oldest goes where there are too many."""
        self._kept.append(FailedRequest(time.time(), model, error.status.name, error.message[:_MAX_CHARS], request_id[:_MAX_CHARS]))

    def newest_first(self) -> tuple[FailedRequest, ...]:
        return tuple(reversed(self._kept))

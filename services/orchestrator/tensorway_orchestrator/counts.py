"""Counters and histograms as plain numbers: what counts a request adds to them, and whoever scrapes pays for the words."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
#: Of the time between two tokens: finer where models differ, from a small one on a GPU to one that a client waits for.
TOKEN_SECONDS: Final = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)
ROWS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)


class Distribution:
    """A histogram. Not thread-safe: lives in the loop."""

    __slots__ = ("_bounds", "_buckets", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """`bounds` are the upper bounds of the buckets, ascending; one more counts what lies above all."""
        self._bounds = bounds
        self._buckets = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, number: int = 1) -> None:
        """Counts `value`, as often as `number` says."""
        self._buckets[bisect_left(self._bounds, value)] += number
        self.sum += value * number

    def cumulative(self) -> Iterator[tuple[str, float]]:
        """Each upper bound, and how many values lie at or below it, as Prometheus wants them."""
        total = 0
        for bound, number in zip((*map(str, self._bounds), "+Inf"), self._buckets, strict=True):
            total += number
            yield bound, total


@dataclass(slots=True)
class ModelCounts:
    """One model's requests in this orchestrator, over all its revisions."""

    num_answered: int = 0
    #: By gRPC status.
    failures: Counter[str] = field(default_factory=Counter)
    queue_s: Distribution = field(default_factory=lambda: Distribution(SECONDS))
    num_fallbacks: int = 0
    num_repeats: int = 0


@dataclass(slots=True)
class BatchCounts:
    """Of a model whose requests are joined in batches."""

    rows: Distribution = field(default_factory=lambda: Distribution(ROWS))
    step_s: Distribution = field(default_factory=lambda: Distribution(SECONDS))
    num_retries: int = 0
    num_lost: int = 0
    num_hedges: int = 0
    num_hedge_wins: int = 0
    num_stuck: int = 0
    num_quarantined: int = 0


@dataclass(slots=True)
class StreamCounts:
    """Of a model that generates."""

    num_tokens: int = 0
    token_gap_s: Distribution = field(default_factory=lambda: Distribution(TOKEN_SECONDS))
    num_restarts: int = 0
    num_resumes: int = 0

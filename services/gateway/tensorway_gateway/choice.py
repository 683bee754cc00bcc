"""Which orchestrator gets a request. Pure.

Rendezvous hash by model, so that one model's requests meet in one batcher; with bounded load, so that one busy model can't drown it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from math import ceil
from typing import Final

#: An orchestrator may hold this many times the mean number of requests in flight before the next in order gets them.
LOAD_FACTOR: Final = 1.25
#: Below this many in flight nothing overflows: a handful of requests is better batched than spread.
MIN_LIMIT: Final = 64


def order(model: str, ids: Iterable[str]) -> tuple[str, ...]:
    """All orchestrators in the order in which `model` prefers them. One that comes or goes moves only its own models."""

    def weight(orchestrator: str) -> bytes:
        return blake2b(f"{model}\0{orchestrator}".encode(), digest_size=8).digest()

    return tuple(sorted(ids, key=weight, reverse=True))


def choose(preferred: Sequence[str], in_flight: Mapping[str, int]) -> str | None:
    """The first of `preferred` that is a key of `in_flight` (can take requests) and below the load limit; None where none can."""
    candidates = [orchestrator for orchestrator in preferred if orchestrator in in_flight]
    if len(candidates) <= 1:
        return candidates[0] if candidates else None
    total = sum(in_flight[orchestrator] for orchestrator in candidates)
    limit = max(MIN_LIMIT, ceil(LOAD_FACTOR * (total + 1) / len(candidates)))
    # They can't all be at the limit: that would be more than there are.
    return next(orchestrator for orchestrator in candidates if in_flight[orchestrator] < limit)

"""Why an epoch has ended, found among all that went wrong in its last moment. Pure.

One rank's death makes the others fail, too, and any of them may be heard first: the cause is what cannot have followed from another rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class Weight(IntEnum):
    """How much a finding explains; the least number is the cause."""

    #: It said itself what went wrong, or something outside of the group killed it.
    OWN = 0
    #: Its node was lost with it.
    NODE_LOST = 1
    #: It went silent, ran a step for too long, or left without a word.
    SILENT = 2
    #: It did not become ready in time.
    LATE = 3
    #: It says that another was lost.
    CONSEQUENCE = 4


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that went wrong."""

    rank: int
    weight: Weight
    #: One sentence, naming the rank.
    text: str
    at_s: float


def cause_of(findings: Iterable[Finding]) -> Finding:
    """The finding that explains the others: by weight, then the first. There must be one at least."""
    return min(findings, key=lambda finding: (finding.weight, finding.at_s))

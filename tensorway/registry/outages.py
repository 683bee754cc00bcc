"""How this process gets on with its registry, for Prometheus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(slots=True)
class Outages:
    """Of the registry that this process uses."""

    #: Operations that the registry did not answer, or could not do.
    num_errors: int = 0
    #: Whether the last operation that needed an answer got none.
    is_away: bool = False


#: Of this process, which has one registry.
OUTAGES: Final = Outages()

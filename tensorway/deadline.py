"""Deadlines: absolute instants on the monotonic clock of this process.

A deadline travels between processes as the time that remains (clocks of two machines never agree); each process turns it back into an
instant the moment it arrives.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

#: Used where a caller sets no deadline: nothing in the mesh waits for ever.
DEFAULT_TIMEOUT_S: Final = 60.0
#: A caller may not ask for more: a longer deadline is cut to this.
MAX_TIMEOUT_S: Final = 3600.0


@dataclass(frozen=True, slots=True, order=True)
class Deadline:
    """An absolute instant, `at_s` seconds on `time.monotonic()`."""

    at_s: float

    @classmethod
    def after(cls, timeout_s: float, now_s: float | None = None) -> Deadline:
        """The instant `timeout_s` seconds from now, never further away than `MAX_TIMEOUT_S`."""
        now = time.monotonic() if now_s is None else now_s
        return cls(now + min(timeout_s, MAX_TIMEOUT_S))

    @classmethod
    def from_remaining_us(cls, remaining_us: int) -> Deadline:
        """The instant a peer meant by `remaining_us` microseconds; 0 means that the peer set none."""
        return cls.after(remaining_us / 1e6 if remaining_us else DEFAULT_TIMEOUT_S)

    def remaining_s(self, now_s: float | None = None) -> float:
        """Seconds left; negative once it has passed."""
        return self.at_s - (time.monotonic() if now_s is None else now_s)

    def remaining_us(self) -> int:
        """Microseconds left for the wire, at least 1 (0 means "none set")."""
        return max(1, int(self.remaining_s() * 1e6))

    def has_expired(self, now_s: float | None = None) -> bool:
        return self.remaining_s(now_s) <= 0.0

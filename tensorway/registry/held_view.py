"""What a watch shows of a registry that may lie for a moment. Pure: takes `now`, touches nothing.

A registry that comes back after an outage may know less than there is: its data is gone, or nobody has reported to it yet. So removals are
held back for a while after a disturbance; what is new or changed shows at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class HeldView(Generic[T]):
    """The rows to show, by key. `None` until the registry has been read once."""

    def __init__(self, settle_s: float) -> None:
        """Removals are held back for `settle_s` seconds after the first look that follows a disturbance."""
        self._settle_s = settle_s
        self._is_disturbed = False
        self._held_until_s = float("-inf")
        self._truth: dict[str, T] | None = None
        self._shown: dict[str, T] | None = None

    @property
    def shown(self) -> Mapping[str, T] | None:
        return self._shown

    def disturb(self) -> None:
        """The registry could not be read, or something says that it has lost what it knew."""
        self._is_disturbed = True

    def take(self, rows: Mapping[str, T], now_s: float) -> bool:
        """A look: what the registry says at `now_s`. Returns whether what is shown has changed."""
        if self._is_disturbed and self._shown is not None:
            self._held_until_s = now_s + self._settle_s
        self._is_disturbed = False
        self._truth = dict(rows)
        return self.settle(now_s)

    def settle(self, now_s: float) -> bool:
        """Shows what may be shown at `now_s`. Returns whether what is shown has changed."""
        if self._truth is None:
            return False
        shown = {**(self._shown or {}), **self._truth} if now_s < self._held_until_s else self._truth
        if shown == self._shown:
            return False
        self._shown = dict(shown)
        return True

    def settles_in_s(self, now_s: float) -> float | None:
        """Seconds until removals that are held back may be shown; None where none are."""
        if self._truth is None or self._shown == self._truth:
            return None
        return max(0.0, self._held_until_s - now_s)

"""How long requests of one revision wait for a group while none lives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

#: Groups that are registered but cannot be reached from here are another orchestrator's to reach: requests go there after so long.
_UNREACHABLE_WAIT_S: Final = 2.0
_NEVER: Final = float("inf")


@dataclass(slots=True, eq=False)
class GroupWait:
    """Lives in the loop. Begins with `missing`, for no group has come yet."""

    wait_s: float
    #: Called once when no group has come in time.
    on_give_up: Callable[[], None]
    #: Infinite while a group lives.
    _since_s: float = _NEVER
    #: Since when the registry knows groups that cannot be reached from here; infinite where it knows none.
    _registered_s: float = _NEVER
    #: No group is wanted before a request comes.
    _is_dormant: bool = False
    #: A group is waited for as long as requests themselves can wait.
    is_patient: bool = False
    _timer: asyncio.TimerHandle | None = None
    #: When the timer goes off.
    _timer_s: float = _NEVER

    def is_over(self, now_s: float) -> bool:
        """True while no group lives and one was waited for long enough."""
        return now_s > self._ends_s

    def missing(self, *, is_registered: bool) -> None:
        """No group lives. `is_registered`: the registry knows some, but no link to them is up. One that has just been registered is about
        to be reached: its time begins with its registration, however long there was none."""
        now_s = time.monotonic()
        self._since_s = min(self._since_s, now_s)
        self._registered_s = min(self._registered_s, now_s) if is_registered else _NEVER
        ends_s = self._ends_s
        if ends_s == _NEVER:
            self.stop()
        elif self._timer is None or ends_s != self._timer_s:
            self.stop()
            self._timer_s = ends_s
            self._timer = asyncio.get_running_loop().call_later(max(0.0, ends_s - now_s), self._give_up)

    @property
    def _ends_s(self) -> float:
        """When one was waited for long enough."""
        if self.is_patient and self.wait_s:
            return _NEVER
        return min(self._since_s + self.wait_s, self._registered_s + _UNREACHABLE_WAIT_S)

    def found(self) -> None:
        """A group lives."""
        self._since_s = self._registered_s = _NEVER
        self.is_patient = self._is_dormant
        self.stop()

    def dormant(self, is_dormant: bool) -> None:
        """Whether no group is wanted before a request comes. Such requests wait until their own deadlines for the group that they start;
        where `wait_s` is 0, nobody waits, for another model answers meanwhile."""
        self._is_dormant = is_dormant
        if is_dormant and not self.is_patient:
            self.is_patient = True
            if self._since_s != _NEVER:
                self.missing(is_registered=False)
        elif not is_dormant and self._since_s == _NEVER:
            self.is_patient = False

    def stop(self) -> None:
        """Nothing is waited for."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        self.on_give_up()

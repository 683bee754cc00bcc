"""The yes or no at the door, and how long an admitted request may take. Pure: decides with numbers it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tensorway.deadline import Deadline
from tensorway.errors import DeadlineExceeded, Overloaded

_SMOOTHING: Final = 0.05
_MIN_RETRY_AFTER_S: Final = 0.01
_MAX_RETRY_AFTER_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one gateway holds at once."""

    max_requests: int
    #: Tensor bytes of all requests in flight.
    max_bytes: int
    max_timeout_s: float


class Admission:
    """Counts what is in flight. Every `admit` that returns is followed by exactly one `release`."""

    __slots__ = ("_limits", "_mean_s", "num_bytes", "num_requests")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._mean_s = 0.0
        self.num_requests = 0
        self.num_bytes = 0

    def admit(self, num_bytes: int) -> None:
        """Takes a place and `num_bytes` bytes. Raises Overloaded with the time after which a place is likely free."""
        limits = self._limits
        if self.num_requests >= limits.max_requests:
            raise self._overloaded(f"the gateway already has {self.num_requests} requests in flight, its limit")
        # A request larger than the whole budget runs when it is alone: refusing it for ever would be no matter of load.
        if self.num_bytes and self.num_bytes + num_bytes > limits.max_bytes:
            raise self._overloaded(
                f"the gateway already holds {self.num_bytes} tensor bytes; {num_bytes} more exceed its limit of {limits.max_bytes}"
            )
        self.num_requests += 1
        self.num_bytes += num_bytes

    def release(self, num_bytes: int, took_s: float) -> None:
        """Gives the place back; `took_s` is how long it was held."""
        self.num_requests -= 1
        self.num_bytes -= num_bytes
        self._mean_s += _SMOOTHING * (took_s - self._mean_s)

    def deadline(self, call: Deadline | None, timeout_s: float | None, default_timeout_s: float, now_s: float) -> Deadline:
        """The earlier of the call's deadline and the dialect's own timeout, else the revision's default; never beyond the cap.

        Raises DeadlineExceeded where it has passed already.
        """
        at_s = now_s + self._limits.max_timeout_s
        if call is not None:
            at_s = min(at_s, call.at_s)
        if timeout_s is not None:
            at_s = min(at_s, now_s + timeout_s)
        if call is None and timeout_s is None:
            at_s = min(at_s, now_s + default_timeout_s)
        if at_s <= now_s:
            raise DeadlineExceeded("the deadline had passed when the request reached the gateway", hop="gateway")
        return Deadline(at_s)

    def _overloaded(self, message: str) -> Overloaded:
        retry_after_s = min(max(self._mean_s, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S)
        return Overloaded(message, retry_after_s=retry_after_s)

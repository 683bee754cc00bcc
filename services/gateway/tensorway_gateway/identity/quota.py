"""How much one caller may use of this gateway. Pure: takes `now_s`, seconds on any clock that never goes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tensorway.access.schema import QuotaRule
from tensorway.errors import Overloaded

_SMOOTHING: Final = 0.1
#: What is said of places in flight: nobody knows when one becomes free, but about as long as requests have taken.
_MIN_RETRY_AFTER_S: Final = 0.01
_MAX_RETRY_AFTER_S: Final = 5.0


class QuotaExceeded(Overloaded):
    """A caller used all that it may; `limit` is the name of the limit in the access file."""

    def __init__(self, message: str, limit: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.limit = limit


class TokenBucket:
    """Fills at `rate` a second up to `burst`; starts full. May be overdrawn by what is only known afterwards."""

    __slots__ = ("_level", "_updated_s", "burst", "rate")

    def __init__(self, rate: float, burst: float, now_s: float) -> None:
        self.rate = rate
        self.burst = burst
        self._level = burst
        self._updated_s = now_s

    def take(self, amount: float, now_s: float) -> float:
        """Takes `amount` and returns 0.0, or takes nothing and returns the seconds until it would be there."""
        missing = amount - self._fill(now_s)
        if missing > 0:
            return missing / self.rate
        self._level -= amount
        return 0.0

    def spend(self, amount: float, now_s: float) -> None:
        """Takes what was used already, below zero where there is not enough."""
        self._fill(now_s)
        self._level -= amount

    def debt_s(self, now_s: float) -> float:
        """Seconds until what was overdrawn is made up; 0.0 where nothing is."""
        return max(0.0, -self._fill(now_s) / self.rate)

    def is_full(self, now_s: float) -> bool:
        return self._fill(now_s) >= self.burst

    def change(self, rate: float, burst: float, now_s: float) -> None:
        """Other limits from now on. What was used stays used, and nothing is given for the change."""
        self._level = min(self._fill(now_s), burst)
        self.rate, self.burst = rate, burst

    def _fill(self, now_s: float) -> float:
        self._level = min(self.burst, self._level + (now_s - self._updated_s) * self.rate)
        self._updated_s = now_s
        return self._level


@dataclass(slots=True)
class Meter:
    """What one caller uses. Every `enter` that returns is followed by one `leave`, every `open_stream` by one `close_stream`."""

    principal: str
    rule: QuotaRule
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None
    num_in_flight: int = 0
    num_streams: int = 0
    _mean_s: float = 0.0

    @property
    def counts_tokens(self) -> bool:
        return self.tokens is not None

    def set_rule(self, rule: QuotaRule, now_s: float) -> None:
        """Other limits from now on; what was used stays used."""
        self.rule = rule
        burst = rule.burst or max(1.0, rule.requests_per_s or 0.0)
        self.requests = _changed(self.requests, rule.requests_per_s, burst, now_s)
        self.tokens = _changed(self.tokens, rule.tokens_per_s, rule.tokens_per_s or 0.0, now_s)

    def enter(self, now_s: float) -> None:
        """One request begins. Raises QuotaExceeded with the time after which it may be tried again."""
        most = self.rule.max_in_flight
        if most is not None and self.num_in_flight >= most:
            raise self._full(f"{self.principal} has {self.num_in_flight} requests in flight here, all that its quota allows")
        if self.tokens is not None:
            wait_s = self.tokens.debt_s(now_s)
            if wait_s > 0:
                raise QuotaExceeded(
                    f"{self.principal} has used more than its {self.tokens.rate:g} tokens a second; come back in {wait_s:.3f} s",
                    "tokens_per_s", wait_s,
                )
        if self.requests is not None:
            wait_s = self.requests.take(1.0, now_s)
            if wait_s > 0:
                raise QuotaExceeded(
                    f"{self.principal} has used its {self.requests.rate:g} requests a second; come back in {wait_s:.3f} s",
                    "requests_per_s", wait_s,
                )
        self.num_in_flight += 1

    def leave(self, took_s: float) -> None:
        """A request has ended."""
        self.num_in_flight -= 1
        self._mean_s += _SMOOTHING * (took_s - self._mean_s)

    def open_stream(self) -> None:
        """A stream begins that carries requests: as many may be open as requests may be in flight. Raises QuotaExceeded."""
        most = self.rule.max_in_flight
        if most is not None and self.num_streams >= most:
            raise self._full(f"{self.principal} has {self.num_streams} streams open here, all that its quota allows")
        self.num_streams += 1

    def close_stream(self) -> None:
        """Such a stream has ended."""
        self.num_streams -= 1

    def spend_tokens(self, num_tokens: int, now_s: float) -> None:
        """Tokens that were generated: counted when they are known, so that the next request waits for them."""
        if self.tokens is not None:
            self.tokens.spend(num_tokens, now_s)

    def is_idle(self, now_s: float) -> bool:
        """Whether a new meter would be no different."""
        buckets = [bucket for bucket in (self.requests, self.tokens) if bucket is not None]
        return not self.num_in_flight and not self.num_streams and all(bucket.is_full(now_s) for bucket in buckets)

    def _full(self, message: str) -> QuotaExceeded:
        return QuotaExceeded(message, "max_in_flight", min(max(self._mean_s, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S))


def _changed(bucket: TokenBucket | None, rate: float | None, burst: float, now_s: float) -> TokenBucket | None:
    if rate is None:
        return None
    if bucket is None:
        return TokenBucket(rate, burst, now_s)
    bucket.change(rate, burst, now_s)
    return bucket


class Meters:
    """One meter a principal; they outlive changes of the access file. Those that are idle are forgotten when there are many."""

    def __init__(self, max_idle: int = 10_000) -> None:
        self._meters: dict[str, Meter] = {}
        self._max_idle = max_idle

    def of(self, principal: str, rule: QuotaRule, now_s: float) -> Meter:
        """The principal's meter, which has this rule from now on."""
        meter = self._meters.get(principal)
        if meter is None:
            if len(self._meters) >= self._max_idle:
                self._meters = {name: known for name, known in self._meters.items() if not known.is_idle(now_s)}
                # Where still all are in use, twice as many are let in before the next look.
                self._max_idle = max(self._max_idle, 2 * len(self._meters))
            meter = self._meters[principal] = Meter(principal, rule)
            meter.set_rule(rule, now_s)
        elif meter.rule != rule:
            meter.set_rule(rule, now_s)
        return meter

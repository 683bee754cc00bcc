"""How long a stream without a reader is kept, and how many of them. Pure: takes `now_s`."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(slots=True)
class Retention:
    """Ids of parked streams in the order in which they expire, which is the order in which they came."""

    retention_s: float
    max_streams: int
    max_bytes: int
    num_bytes: int = 0
    _parked: OrderedDict[str, tuple[float, int]] = field(default_factory=OrderedDict)

    @property
    def num_parked(self) -> int:
        return len(self._parked)

    @property
    def next_expiry_s(self) -> float | None:
        """When the first expires; None where none is parked."""
        return next(iter(self._parked.values()))[0] if self._parked else None

    def park(self, stream_id: str, num_bytes: int, now_s: float) -> list[str]:
        """Keeps a stream from now on; returns those that had to make room for it, itself perhaps among them."""
        self.take(stream_id)
        self._parked[stream_id] = (now_s + self.retention_s, num_bytes)
        self.num_bytes += num_bytes
        gone: list[str] = []
        while self._parked and (len(self._parked) > self.max_streams or self.num_bytes > self.max_bytes):
            gone.append(self._pop_first())
        return gone

    def take(self, stream_id: str) -> None:
        """Its reader is back, or nobody wants it any more."""
        _, num_bytes = self._parked.pop(stream_id, (0.0, 0))
        self.num_bytes -= num_bytes

    def expire(self, now_s: float) -> list[str]:
        """Ids of those whose time is over; they are parked no more."""
        gone: list[str] = []
        while self._parked and next(iter(self._parked.values()))[0] <= now_s:
            gone.append(self._pop_first())
        return gone

    def _pop_first(self) -> str:
        stream_id, (_, num_bytes) = self._parked.popitem(last=False)
        self.num_bytes -= num_bytes
        return stream_id

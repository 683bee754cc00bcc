"""Every request that was sent and what became of it, and how late this process itself was to look."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final

from tensorway.errors import Status

_PULSE_S: Final = 0.02


@dataclass(slots=True, eq=False)
class Record:
    """One request. Instants are seconds on `time.monotonic()`."""

    id: str
    #: `identity`, `embedding` or `stream`.
    kind: str
    sent_s: float
    deadline_s: float
    #: None while it is under way.
    ended_s: float | None = None
    #: OK, or why it failed.
    status: Status | None = None
    error: str = ""
    is_retryable: bool = False
    #: Answers that came for it; of a stream, its ends.
    num_answers: int = 0
    #: What is wrong with the answer; empty where it is right.
    wrong: str = ""
    #: What came a second time: an answer, or tokens of a stream.
    twice: str = ""
    num_tokens: int = 0

    @property
    def is_ok(self) -> bool:
        return self.status is Status.OK

    @property
    def took_s(self) -> float:
        """From sending to the end; infinite while it is under way."""
        return float("inf") if self.ended_s is None else self.ended_s - self.sent_s


@dataclass(slots=True, eq=False)
class Journal:
    """All records in the order of sending, and the pauses of this process's own loop."""

    records: list[Record] = field(default_factory=list)
    #: (when the loop was to wake, when it did).
    pauses: list[tuple[float, float]] = field(default_factory=list)

    def begin(self, id: str, kind: str, timeout_s: float) -> Record:
        now_s = time.monotonic()
        record = Record(id, kind, now_s, now_s + timeout_s)
        self.records.append(record)
        return record

    def between(self, from_s: float, to_s: float) -> list[Record]:
        """The requests sent in that time."""
        first = bisect_left(self.records, from_s, key=lambda record: record.sent_s)
        last = bisect_left(self.records, to_s, key=lambda record: record.sent_s)
        return self.records[first:last]

    def num_open(self) -> int:
        return sum(record.ended_s is None for record in self.records)

    def own_delay_s(self, from_s: float, to_s: float) -> float:
        """How much later than it should this process looked at what came between two instants."""
        return max((woke_s - due_s for due_s, woke_s in self.pauses if woke_s >= from_s and due_s <= to_s), default=0.0)

    async def keep_pulse(self) -> None:
        """Notes pauses of the loop until cancelled: what this process did not see in time is not the mesh's doing."""
        while True:
            due_s = time.monotonic() + _PULSE_S
            await asyncio.sleep(_PULSE_S)
            woke_s = time.monotonic()
            if woke_s - due_s > 0.005:
                self.pauses.append((due_s, woke_s))

"""Requests that come again with the same key: one run, one answer. Pure.

A key is the caller's word that two requests are one (IETF draft "The Idempotency-Key HTTP header field"; same key with other content is an
error there, too). While the first runs, others wait for its answer; later they get the answer that was kept, until room or time runs out.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

OutcomeT = TypeVar("OutcomeT")
WaiterT = TypeVar("WaiterT")


@dataclass(slots=True, eq=False)
class Keyed(Generic[WaiterT, OutcomeT]):
    """One key: who waits for the answer, or the answer."""

    fingerprint: str
    waiters: list[WaiterT] = field(default_factory=list)
    outcome: OutcomeT | None = None
    num_bytes: int = 0
    expires_s: float = float("inf")


@dataclass(slots=True)
class KeyTable(Generic[WaiterT, OutcomeT]):
    """All keys of one orchestrator: those that run, and those that are answered and kept, the oldest first."""

    retention_s: float
    max_bytes: int
    num_bytes: int = 0
    _running: dict[str, Keyed[WaiterT, OutcomeT]] = field(default_factory=dict)
    _kept: OrderedDict[str, Keyed[WaiterT, OutcomeT]] = field(default_factory=OrderedDict)

    def find(self, key: str, now_s: float) -> Keyed[WaiterT, OutcomeT] | None:
        """What is known of `key`."""
        self._forget_old(now_s)
        return self._running.get(key) or self._kept.get(key)

    def begin(self, key: str, fingerprint: str) -> Keyed[WaiterT, OutcomeT]:
        """A key that nobody knows begins to run."""
        keyed = self._running[key] = Keyed[WaiterT, OutcomeT](fingerprint)
        return keyed

    def answered(self, key: str, outcome: OutcomeT, num_bytes: int, now_s: float) -> list[WaiterT]:
        """The run has ended with an answer that holds for every repetition; returns who waits for it."""
        keyed = self._running.pop(key)
        waiters, keyed.waiters = keyed.waiters, []
        if num_bytes <= self.max_bytes and self.retention_s > 0.0:
            keyed.outcome, keyed.num_bytes, keyed.expires_s = outcome, num_bytes, now_s + self.retention_s
            self._kept[key] = keyed
            self.num_bytes += num_bytes
        self._forget_old(now_s)
        return waiters

    def dropped(self, key: str) -> list[WaiterT]:
        """The run has come to nothing that another would repeat; returns who waits. The next request of this key is run."""
        return self._running.pop(key).waiters

    def _forget_old(self, now_s: float) -> None:
        while self._kept:
            key, oldest = next(iter(self._kept.items()))
            if oldest.expires_s > now_s and self.num_bytes <= self.max_bytes:
                return
            del self._kept[key]
            self.num_bytes -= oldest.num_bytes

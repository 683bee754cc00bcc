"""What a rank tells its node of itself with every status, besides its state."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from tensorway.telemetry.tracing import NO_TRACER, Tracer
from tensorway_worker.rank.executor import Executor
from tensorway_worker.rank.memory import Meter, open_meter


class Facts:
    """Memory, how busy the torch thread is, what became of spans, and what is particular to a service. Lives in the loop."""

    def __init__(self, device: str, executor: Executor) -> None:
        self._device = device
        self._executor = executor
        self._meter: Meter = open_meter(device)
        self._read_s = time.monotonic()
        self._busy_s = 0.0
        #: Bytes of this rank's weights, once loaded.
        self.weights_bytes = 0
        #: Takes this rank's spans, once it is open.
        self.tracer: Tracer = NO_TRACER
        #: Tells the news of an adaptation.
        self.news: Callable[[], str] | None = None
        #: Counts the answers of a leader that generates, by field of `RankStatus`.
        self.answers: Callable[[], Mapping[str, int]] | None = None

    def limit_memory(self, own_limit: int) -> None:
        """The model's own limit, bytes; 0 for none."""
        self._meter = open_meter(self._device, own_limit)

    def read(self) -> dict[str, Any]:
        """Fields of `RankStatus`. `busy_share` is of the time since the last reading."""
        now_s, busy_s = time.monotonic(), self._executor.busy_s
        elapsed_s, worked_s = now_s - self._read_s, busy_s - self._busy_s
        self._read_s, self._busy_s = now_s, busy_s
        share = min(1.0, max(0.0, worked_s / elapsed_s)) if elapsed_s > 0 else 0.0
        num_exported, num_dropped = self.tracer.counts
        return {
            "weights_bytes": self.weights_bytes,
            "memory_bytes": self._meter.used(),
            "memory_limit_bytes": self._meter.limit(),
            "busy_share": round(share, 3),
            "num_exported_spans": num_exported,
            "num_dropped_spans": num_dropped,
            **({} if self.answers is None else self.answers()),
            **({} if self.news is None else {"news": self.news()}),
        }

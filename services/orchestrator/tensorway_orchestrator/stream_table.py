"""Every stream of this orchestrator by its id, whatever its revision: open, parked, or ended a moment ago."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from tensorway.errors import NotFound
from tensorway.telemetry.tracing import NO_TRACER, Tracer
from tensorway.transport.port import Exchange
from tensorway_orchestrator.metrics import OrchestratorMetrics
from tensorway_orchestrator.request_trace import resumed
from tensorway_orchestrator.retention import Retention
from tensorway_orchestrator.streams import Stream


class StreamOwner(Protocol):
    """The lane of a stream."""

    def resume(self, stream: Stream, origin: Exchange) -> None:
        """Goes on with a stream for a new reader, whatever became of the old one."""


class StreamTable:
    """Lives in the loop."""

    def __init__(self, retention: Retention, metrics: OrchestratorMetrics, tracer: Tracer = NO_TRACER) -> None:
        self._retention = retention
        self._tracer = tracer
        self._streams: dict[str, tuple[StreamOwner, Stream]] = {}
        self._timer: asyncio.TimerHandle | None = None
        metrics.num_parked = lambda: retention.num_parked

    @property
    def num_parked(self) -> int:
        return self._retention.num_parked

    def add(self, owner: StreamOwner, stream: Stream) -> None:
        """A stream was opened. Nobody else can know the id of one that is not resumable."""
        if stream.generation.is_resumable:
            self._streams[stream.id] = (owner, stream)

    def find(self, stream_id: str) -> tuple[StreamOwner, Stream] | None:
        return self._streams.get(stream_id)

    def resume(self, stream_id: str, origin: Exchange, next_sequence: int, traceparent: str = "") -> None:
        """Hands a stream to a new reader, whose call is traced under `traceparent` unless that is empty. Raises NotFound for a stream that
        is not known (any more), InvalidRequest for a wrong number."""
        found = self.find(stream_id)
        if found is None:
            raise NotFound(
                f"stream {stream_id!r} is not known here: it never was, it failed, or it was given up "
                f"{self._retention.retention_s:g} s after its client had gone", field="resume.stream_id",
            )
        owner, stream = found
        stream.log.rewind(next_sequence, stream.id)
        resumed(stream, traceparent, self._tracer)
        owner.resume(stream, origin)

    def park(self, stream: Stream) -> None:
        """A stream without a reader is kept for a while."""
        if stream.id not in self._streams:
            return
        for stream_id in self._retention.park(stream.id, stream.num_bytes, time.monotonic()):
            del self._streams[stream_id]
        self._set_timer()

    def take(self, stream: Stream) -> None:
        """A parked stream has a reader again."""
        self._retention.take(stream.id)

    def drop(self, stream: Stream) -> None:
        """A stream is over, and cannot be resumed."""
        found = self._streams.get(stream.id)
        # Its id may be another's by now: that of the same stream, come back from another orchestrator.
        if found is not None and found[1] is stream:
            del self._streams[stream.id]
            self._retention.take(stream.id)

    def drop_parked_of(self, owner: StreamOwner) -> None:
        """The revision was withdrawn: what has no reader cannot be resumed."""
        for _, stream in [kept for kept in self._streams.values() if kept[0] is owner and kept[1].origin is None]:
            self.drop(stream)

    def close(self) -> None:
        """Forgets all."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._streams.clear()

    def _set_timer(self) -> None:
        expiry_s = self._retention.next_expiry_s
        if self._timer is None and expiry_s is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, expiry_s - time.monotonic()), self._expire)

    def _expire(self) -> None:
        self._timer = None
        for stream_id in self._retention.expire(time.monotonic()):
            del self._streams[stream_id]
        self._set_timer()

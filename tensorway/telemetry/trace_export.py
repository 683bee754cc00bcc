"""Exports spans over OTLP/gRPC from a thread of its own. The only module that imports OpenTelemetry; imported only where tracing is on."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from opentelemetry import trace as otel
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event as OtelEvent
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from tensorway.errors import FailedPrecondition
from tensorway.telemetry.trace_context import SpanContext
from tensorway.telemetry.tracing import Span, TraceSettings

_LOG = logging.getLogger(__name__)
#: Spans that may wait; later ones are dropped, and counted.
MAX_WAITING: Final = 8192
#: So many leave at once, at the latest after so long.
_BATCH: Final = 512
_DELAY_S: Final = 1.0
#: How long one export may take, with the exporter's own attempts.
_EXPORT_TIMEOUT_S: Final = 10.0
#: A receiver that is away is worth one line so often.
_COMPLAIN_EVERY_S: Final = 60.0
_SAMPLED: Final = otel.TraceFlags(otel.TraceFlags.SAMPLED)


class SpanExport:
    """A bounded queue and the thread that empties it. A receiver that is away costs its spans and nothing else."""

    def __init__(self, settings: TraceSettings, resource: Mapping[str, str]) -> None:
        """Raises FailedPrecondition where a file of the settings cannot be read."""
        # The exporter complains about every attempt; what matters is said here.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
        self._endpoint = settings.endpoint
        self._exporter = _exporter_of(settings)
        ours = version("tensorway")
        self._resource = Resource({
            "telemetry.sdk.language": "python", "telemetry.sdk.name": "tensorway", "telemetry.sdk.version": ours, "service.version": ours,
            **resource,
        })
        self._scope = InstrumentationScope("tensorway", ours)
        self._waiting: deque[Span] = deque()
        self._turn = threading.Condition()
        self._is_closing = False
        self._complains_at_s = 0.0
        self.num_exported = 0
        self.num_dropped = 0
        self._thread = threading.Thread(target=self._serve, name="trace-export", daemon=True)
        self._thread.start()

    def offer(self, span: Span) -> None:
        """Queues a span, from any thread; drops it where the queue is full."""
        with self._turn:
            if len(self._waiting) >= MAX_WAITING or self._is_closing:
                self.num_dropped += 1
                return
            self._waiting.append(span)
            if len(self._waiting) in (1, _BATCH):
                self._turn.notify()

    def close(self, timeout_s: float) -> None:
        """Exports what waits, for at most `timeout_s` seconds. Blocks; harmless to repeat."""
        with self._turn:
            self._is_closing = True
            self._turn.notify()
        self._thread.join(max(0.0, timeout_s))
        if self._thread.is_alive():
            # Ends the call that is on its way, and with it the thread.
            self._exporter.shutdown()
            self._thread.join(0.5)

    def _serve(self) -> None:
        while (batch := self._next_batch()) is not None:
            self._export(batch)
        self._exporter.shutdown()

    def _next_batch(self) -> list[Span] | None:
        """None once all is exported and the service stops."""
        with self._turn:
            self._turn.wait_for(lambda: self._waiting or self._is_closing)
            # What follows soon goes along.
            self._turn.wait_for(lambda: len(self._waiting) >= _BATCH or self._is_closing, _DELAY_S)
            batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
            return batch or (None if self._is_closing else [])

    def _export(self, batch: Sequence[Span]) -> None:
        # One anchor for a batch: clocks may be set while the process runs.
        anchor_ns = time.time_ns() - time.monotonic_ns()
        try:
            result = self._exporter.export([self._readable(span, anchor_ns) for span in batch])
        except Exception as error:  # noqa: BLE001 - tracing must not end what it observes
            result, reason = SpanExportResult.FAILURE, f"{type(error).__name__}: {error}"
        else:
            reason = "it did not take them"
        if result is SpanExportResult.SUCCESS:
            self.num_exported += len(batch)
            return
        with self._turn:
            self.num_dropped += len(batch)
        now_s = time.monotonic()
        if now_s >= self._complains_at_s:
            self._complains_at_s = now_s + _COMPLAIN_EVERY_S
            _LOG.warning("spans cannot be exported to %s: %s; %d dropped so far", self._endpoint, reason, self.num_dropped)

    def _readable(self, span: Span, anchor_ns: int) -> ReadableSpan:
        parent = SpanContext(span.context.trace_id, span.parent_id, span.context.state) if span.parent_id else None
        return ReadableSpan(
            name=span.name,
            context=_otel_context(span.context, is_remote=False),
            parent=None if parent is None else _otel_context(parent, is_remote=True),
            resource=self._resource,
            attributes=span.attributes,
            events=[OtelEvent(event.name, dict(event.attributes), _wall_ns(event.at_s, anchor_ns)) for event in span.events],
            links=[otel.Link(_otel_context(link, is_remote=True)) for link in span.links],
            kind=otel.SpanKind(span.kind),
            status=otel.Status(otel.StatusCode.ERROR, span.error) if span.error else otel.Status(),
            start_time=_wall_ns(span.began_s, anchor_ns),
            end_time=_wall_ns(span.ended_s, anchor_ns),
            instrumentation_scope=self._scope,
        )


def _wall_ns(instant_s: float, anchor_ns: int) -> int:
    return anchor_ns + int(instant_s * 1e9)


def _otel_context(context: SpanContext, *, is_remote: bool) -> otel.SpanContext:
    state = otel.TraceState.from_header([context.state]) if context.state else None
    return otel.SpanContext(int(context.trace_id, 16), int(context.span_id, 16), is_remote, _SAMPLED, state)


def _exporter_of(settings: TraceSettings) -> OTLPSpanExporter:
    is_secure = settings.endpoint.startswith("https://")
    more: dict[str, Any] = {}
    if settings.headers_file:
        more["headers"] = _read_headers(settings.headers_file)
    if is_secure and settings.ca_file:
        from tensorway.transport.trace_credentials import root_credentials

        more["credentials"] = root_credentials(_read(settings.ca_file, "trace_ca_file"))
    endpoint = settings.endpoint if "://" in settings.endpoint else f"http://{settings.endpoint}"
    return OTLPSpanExporter(endpoint=endpoint, insecure=not is_secure, timeout=_EXPORT_TIMEOUT_S, **more)


def _read_headers(path: str) -> tuple[tuple[str, str], ...]:
    """`name: value` lines; empty ones and those that begin with # are left out."""
    pairs: list[tuple[str, str]] = []
    for line in _read(path, "trace_headers_file").decode("utf-8", "replace").splitlines():
        name, colon, value = line.partition(":")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not colon:
            raise FailedPrecondition(f"trace_headers_file: {path} has a line that is no `name: value`", field="trace_headers_file")
        pairs.append((name.strip().lower(), value.strip()))
    return tuple(pairs)


def _read(path: str, field: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise FailedPrecondition(f"{field}: {path} cannot be read: {error}", field=field) from error

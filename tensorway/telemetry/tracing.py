"""Spans of sampled requests, made after the fact from instants that are known anyway, and handed to a thread that exports them.

An unsampled request costs one look at its metadata and one random number. OpenTelemetry is imported only where tracing is on
(`trace_export.py`): without, no service has it in memory. OpenTelemetry's own instrumentation of gRPC is not used: it costs some 60 µs a
request even where nothing is sampled.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from random import random
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tensorway.errors import FailedPrecondition
from tensorway.telemetry.trace_context import SpanContext, new_trace, read_traceparent

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

    from tensorway.telemetry.trace_export import SpanExport

#: Kinds of spans, numbered as in `opentelemetry.trace.SpanKind`.
INTERNAL: Final = 0
SERVER: Final = 1
CLIENT: Final = 2

Attribute = str | bool | int | float
Metadata = Mapping[str, str | bytes]


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """Where spans go, and of which requests."""

    #: host:port of an OTLP/gRPC receiver, `https://host:port` for TLS; empty: tracing is off.
    endpoint: str = ""
    #: Share of the requests that come without a traceparent, 0 to 1.
    sample: float = 0.0
    #: PEM file of the authority of the receiver's certificate; empty: the system's.
    ca_file: str = ""
    #: File of `name: value` lines that go with each export; empty: none.
    headers_file: str = ""


class Event(NamedTuple):
    """Something that happened during a span."""

    name: str
    #: On the monotonic clock.
    at_s: float
    attributes: Mapping[str, Attribute] = {}


@dataclass(slots=True, eq=False)
class Span:
    """One span, until it is recorded its maker's to change. Instants are seconds on `time.monotonic()`."""

    name: str
    context: SpanContext
    #: Id of the span that it is part of; empty: it begins its trace.
    parent_id: str
    began_s: float
    ended_s: float = 0.0
    kind: int = INTERNAL
    attributes: dict[str, Attribute] = field(default_factory=dict)
    links: list[SpanContext] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    #: Why it failed; empty where it did not.
    error: str = ""

    def add_event(self, name: str, at_s: float | None = None, attributes: Mapping[str, Attribute] | None = None) -> None:
        """Something happened, now or at `at_s`."""
        self.events.append(Event(name, time.monotonic() if at_s is None else at_s, attributes or {}))


def child_of(
    parent: SpanContext, name: str, began_s: float, kind: int = INTERNAL, attributes: dict[str, Attribute] | None = None
) -> Span:
    """A new span under `parent`."""
    return Span(name, parent.child(), parent.span_id, began_s, kind=kind, attributes=attributes or {})


class Tracer:
    """Decides which requests are sampled, and takes their spans. One per process; `record` may be called from any thread."""

    def __init__(self, export: SpanExport | None = None, sample: float = 0.0) -> None:
        self._export = export
        self._sample = sample
        self.is_on: Final = export is not None

    def open(self, metadata: Metadata, name: str, began_s: float) -> Span | None:
        """The span of a request that came with this metadata, kind server; None where it is not sampled.

        A caller that sends a traceparent decides (parent-based sampling); of those that send none, or a malformed one, a share is drawn.
        """
        if self._export is None:
            return None
        header = metadata.get("traceparent")
        if header is None:
            if random() >= self._sample:
                return None
            return Span(name, new_trace(), "", began_s, kind=SERVER)
        given = read_traceparent(header, metadata.get("tracestate"))
        if given is None:
            return Span(name, new_trace(), "", began_s, kind=SERVER) if random() < self._sample else None
        return Span(name, given.context.child(), given.context.span_id, began_s, kind=SERVER) if given.is_sampled else None

    def record(self, span: Span, ended_s: float | None = None) -> None:
        """The span is over, now or at `ended_s`, and not changed any more."""
        span.ended_s = time.monotonic() if ended_s is None else ended_s
        if self._export is not None:
            self._export.offer(span)

    @property
    def counts(self) -> tuple[int, int]:
        """Spans that were exported, and that were dropped."""
        return (0, 0) if self._export is None else (self._export.num_exported, self._export.num_dropped)

    def close(self, timeout_s: float) -> None:
        """Exports what waits, for at most `timeout_s` seconds. Blocks; harmless to repeat."""
        if self._export is not None:
            self._export.close(timeout_s)


#: The tracer of a process that traces nothing.
NO_TRACER: Final = Tracer()


def open_tracer(settings: TraceSettings, resource: Mapping[str, str]) -> Tracer:
    """The tracer of this process; `resource` says which process that is, in OpenTelemetry's words (`service.name`, …).

    Raises FailedPrecondition where a file cannot be read, or OpenTelemetry is not installed.
    """
    if not settings.endpoint:
        return NO_TRACER
    # Only here: it takes a third of a second and some 20 MB.
    try:
        from tensorway.telemetry.trace_export import SpanExport
    except ImportError as error:
        raise FailedPrecondition(
            f"trace_endpoint: tracing needs OpenTelemetry ({error}); install opentelemetry-sdk and opentelemetry-exporter-otlp-proto-grpc",
            field="trace_endpoint",
        ) from error
    return Tracer(SpanExport(settings, resource), settings.sample)


def service_resource(name: str, instance: str, zone: str) -> dict[str, str]:
    """Who a process is, by OpenTelemetry's semantic conventions. `name` is gateway, orchestrator, …"""
    resource = {"service.namespace": "tensorway", "service.name": f"tensorway-{name}", "service.instance.id": instance}
    return {**resource, "cloud.availability_zone": zone} if zone else resource


class TraceCollector:
    """Spans as a metric, for a process that traces."""

    def __init__(self, tracer: Tracer, metrics: CollectorRegistry) -> None:
        self._tracer = tracer
        if tracer.is_on:
            metrics.register(self)

    def collect(self) -> Iterable[Metric]:
        """Called by prometheus_client."""
        from prometheus_client.core import CounterMetricFamily

        spans: Any = CounterMetricFamily("tensorway_trace_spans", "Spans by what became of them.", labels=("outcome",))
        exported, dropped = self._tracer.counts
        spans.add_metric(("exported",), exported)
        spans.add_metric(("dropped",), dropped)
        return (spans,)

"""Counts of every model's requests through this gateway, for OIP's ModelStatistics and for Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tensorway.errors import Status
from tensorway_gateway.recent_errors import RecentErrors
from tensorway_gateway.requests import Timing

#: Upper bounds of the duration histogram, seconds.
BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_MAX_GROUPS: Final = 4096


@dataclass(slots=True)
class BatchCounts:
    """Steps of one batch size. Durations in microseconds."""

    num_steps: int = 0
    step_us: int = 0
    prepare_us: int = 0


@dataclass(slots=True)
class RevisionCounts:
    """Requests of one revision. Durations in microseconds."""

    num_rows: int = 0
    num_steps: int = 0
    num_succeeded: int = 0
    succeeded_us: int = 0
    num_failed: int = 0
    failed_us: int = 0
    #: In the orchestrator's queue and at the leader before the step.
    queue_us: int = 0
    prepare_us: int = 0
    step_us: int = 0
    #: Unix time of the last request, seconds.
    last_s: float = 0.0
    batches: dict[int, BatchCounts] = field(default_factory=dict)

    def succeed(self, rows: int, timing: Timing, took_s: float, unix_s: float) -> None:
        """One request of `rows` rows answered, `took_s` seconds after it came in."""
        self.last_s = unix_s
        self.num_succeeded += 1
        self.num_rows += rows
        self.succeeded_us += int(took_s * 1e6)
        self.queue_us += timing.queue_us + timing.wait_us
        self.prepare_us += timing.prepare_us
        self.step_us += timing.step_us
        if timing.is_first_in_batch:
            self.num_steps += 1
            batch = self.batches.get(timing.batch_rows)
            if batch is None:
                batch = self.batches[timing.batch_rows] = BatchCounts()
            batch.num_steps += 1
            batch.step_us += timing.step_us
            batch.prepare_us += timing.prepare_us

    def succeed_stream(self, took_s: float, unix_s: float) -> None:
        """One generation came to its end. How long it queued and stepped is not known here, for nobody told."""
        self.last_s = unix_s
        self.num_succeeded += 1
        self.num_rows += 1
        self.succeeded_us += int(took_s * 1e6)

    def fail(self, took_s: float, unix_s: float) -> None:
        """One request that got as far as this revision and then failed."""
        self.last_s = unix_s
        self.num_failed += 1
        self.failed_us += int(took_s * 1e6)


@dataclass(slots=True)
class ModelTotals:
    """Requests of one model, as Prometheus counts them."""

    statuses: Counter[Status] = field(default_factory=Counter)
    #: One more than BUCKETS_S: the last counts what is longer than all.
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    duration_s: float = 0.0
    num_bytes: int = 0
    #: Messages of streams, and the time to the first delta of each, in the same buckets.
    num_messages: int = 0
    first_delta_buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    first_delta_s: float = 0.0


class Statistics:
    """Only names of known models come in here, so that no caller can grow it."""

    def __init__(self) -> None:
        self._revisions: dict[tuple[str, str], RevisionCounts] = {}
        self._models: dict[str, ModelTotals] = {}
        #: Requests that named no known model, by status.
        self.unknown: Counter[Status] = Counter()
        #: Answers by the group and epoch that made them, as the orchestrators say; streams are not among them.
        self.groups: Counter[str] = Counter()
        self.errors = RecentErrors()

    @property
    def models(self) -> Mapping[str, ModelTotals]:
        return self._models

    def revision(self, model: str, revision: str) -> RevisionCounts:
        """The counts of one revision, made on first use."""
        counts = self._revisions.get((model, revision))
        if counts is None:
            counts = self._revisions[model, revision] = RevisionCounts()
        return counts

    def answered_by(self, group: str) -> None:
        """A group has answered. Groups of long ago are forgotten together with all others: who looks sees differences."""
        if len(self.groups) >= _MAX_GROUPS and group not in self.groups:
            self.groups.clear()
        self.groups[group] += 1

    def count(self, model: str, status: Status, num_bytes: int, took_s: float) -> None:
        """One finished request of a known model."""
        totals = self._totals(model)
        totals.statuses[status] += 1
        totals.num_bytes += num_bytes
        totals.duration_s += took_s
        totals.buckets[bisect_left(BUCKETS_S, took_s)] += 1

    def relay(self, model: str, num_messages: int, first_delta_s: float | None) -> None:
        """What one stream of a known model sent; `first_delta_s` None: no delta."""
        totals = self._totals(model)
        totals.num_messages += num_messages
        if first_delta_s is not None:
            totals.first_delta_s += first_delta_s
            totals.first_delta_buckets[bisect_left(BUCKETS_S, first_delta_s)] += 1

    def _totals(self, model: str) -> ModelTotals:
        totals = self._models.get(model)
        if totals is None:
            totals = self._models[model] = ModelTotals()
        return totals


class StatisticsCollector(Collector):
    """Renders the counts when Prometheus asks: nothing is paid per request."""

    def __init__(self, statistics: Statistics, in_flight: Callable[[], tuple[int, int]], registry: CollectorRegistry) -> None:
        self._statistics = statistics
        self._in_flight = in_flight
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """The metrics as they are now; called for each scrape."""
        requests = CounterMetricFamily("tensorway_gateway_requests", "Requests answered.", labels=("model", "code"))
        received = CounterMetricFamily("tensorway_gateway_received_bytes", "Tensor bytes received.", labels=("model",))
        durations = HistogramMetricFamily(
            "tensorway_gateway_request_duration_seconds", "From the request's bytes to its answer's.", labels=("model",)
        )
        messages = CounterMetricFamily("tensorway_gateway_stream_messages", "Messages of token streams sent to clients.", labels=("model",))
        firsts = HistogramMetricFamily(
            "tensorway_gateway_first_delta_seconds", "From a generation's bytes to its first delta, sent to the client.", labels=("model",)
        )
        for status, number in self._statistics.unknown.items():
            requests.add_metric(("", status.name), number)
        for model, totals in self._statistics.models.items():
            for status, number in totals.statuses.items():
                requests.add_metric((model, status.name), number)
            received.add_metric((model,), totals.num_bytes)
            durations.add_metric((model,), list(_cumulative(totals.buckets)), totals.duration_s)
            if totals.num_messages:
                messages.add_metric((model,), totals.num_messages)
                firsts.add_metric((model,), list(_cumulative(totals.first_delta_buckets)), totals.first_delta_s)
        num_requests, num_bytes = self._in_flight()
        yield from (requests, received, durations, messages, firsts)
        yield GaugeMetricFamily("tensorway_gateway_in_flight_requests", "Requests in flight.", num_requests)
        yield GaugeMetricFamily("tensorway_gateway_in_flight_bytes", "Tensor bytes in flight.", num_bytes)


def _cumulative(buckets: list[int]) -> Iterator[tuple[str, float]]:
    total = 0
    for bound, number in zip((*map(str, BUCKETS_S), "+Inf"), buckets, strict=True):
        total += number
        yield bound, total

"""What each live group was sent, read when somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry


class SentTo(Protocol):
    """A live group, as far as it is counted."""

    @property
    def group(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def num_sent(self) -> int: ...

    @property
    def num_in_flight(self) -> int: ...


class PoolCollector(Collector):
    """`groups` gives every live group, `held_bytes` the tensor bytes of all open requests."""

    def __init__(self, groups: Callable[[], Iterable[SentTo]], held_bytes: Callable[[], int], registry: CollectorRegistry) -> None:
        self._groups = groups
        self._held_bytes = held_bytes
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """One look. Runs in the loop, like everything that changes a group."""
        labels = ("model", "group")
        sent = CounterMetricFamily(
            "tensorway_orchestrator_sent", "Batches, or answers of tokens to be made, that a live group was sent.", labels=labels
        )
        in_flight = GaugeMetricFamily("tensorway_orchestrator_group_in_flight", "Those that it has not answered.", labels=labels)
        # One that was formed anew may still be leaving with its old epoch.
        by_id: dict[tuple[str, str], list[SentTo]] = {}
        for group in self._groups():
            by_id.setdefault((group.model, group.group), []).append(group)
        for label, found in by_id.items():
            sent.add_metric(label, sum(each.num_sent for each in found))
            in_flight.add_metric(label, sum(each.num_in_flight for each in found))
        yield from (sent, in_flight)
        yield GaugeMetricFamily("tensorway_orchestrator_held_bytes", "Tensor bytes of all open requests.", self._held_bytes())

"""What each live group was sent, and what is open, read when somebody looks."""

from __future__ import annotations

from collections import Counter
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
    """`groups` gives every live group, `open_requests` the model and the open requests of each lane."""

    def __init__(
        self, groups: Callable[[], Iterable[SentTo]], open_requests: Callable[[], Iterable[tuple[str, int]]], held_bytes: Callable[[], int],
        registry: CollectorRegistry,
    ) -> None:
        self._groups = groups
        self._open_requests = open_requests
        self._held_bytes = held_bytes
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """One look. Runs in the loop, like everything that changes a group."""
        labels = ("model", "group")
        sent = CounterMetricFamily(
            "tensorway_orchestrator_sent", "Batches, or answers of tokens to be made, that a live group was sent.", labels=labels
        )
        in_flight = GaugeMetricFamily("tensorway_orchestrator_group_in_flight", "Those that it has not answered.", labels=labels)
        for group in self._groups():
            sent.add_metric((group.model, group.group), group.num_sent)
            in_flight.add_metric((group.model, group.group), group.num_in_flight)
        # A model may have several revisions, each with a lane of its own.
        num_open: Counter[str] = Counter()
        for model, number in self._open_requests():
            num_open[model] += number
        opened = GaugeMetricFamily("tensorway_orchestrator_open_requests", "Requests not answered, waiting or running.", labels=("model",))
        for model, number in num_open.items():
            opened.add_metric((model,), number)
        yield from (sent, in_flight, opened)
        yield GaugeMetricFamily("tensorway_orchestrator_held_bytes", "Tensor bytes of all open requests.", self._held_bytes())

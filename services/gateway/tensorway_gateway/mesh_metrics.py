"""What a gateway tells Prometheus of the mesh behind it."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tensorway_gateway.catalog import Catalog
from tensorway_gateway.upstream import Orchestrator, Upstream


class MeshCollector(Collector):
    """Renders what the gateway knows anyway when Prometheus asks: nothing is paid per request."""

    def __init__(self, catalog: Catalog, upstream: Upstream, metrics: CollectorRegistry) -> None:
        self._catalog = catalog
        self._upstream = upstream
        metrics.register(self)

    def collect(self) -> Iterable[Metric]:
        """The metrics as they are now; called for each scrape."""
        wanted = GaugeMetricFamily("tensorway_gateway_wanted_replicas", "Replicas that are wanted.", labels=("model",))
        ready = GaugeMetricFamily("tensorway_gateway_ready_replicas", "Groups of the serving revision that serve.", labels=("model",))
        for name, model in self._catalog.models.items():
            wanted.add_metric((name,), model.num_replicas)
            ready.add_metric((name,), model.serving.num_ready_replicas)
        yield from (wanted, ready)
        yield from self._orchestrators()

    def _orchestrators(self) -> Iterable[Metric]:
        labels = ("orchestrator",)
        connected = GaugeMetricFamily("tensorway_gateway_orchestrator_connected", "1 while requests can be sent there.", labels=labels)
        sent = CounterMetricFamily("tensorway_gateway_sent", "Requests and streams sent to an orchestrator.", labels=labels)
        in_flight = GaugeMetricFamily("tensorway_gateway_orchestrator_in_flight", "Those that it has not answered.", labels=labels)
        # One that has come again may still be leaving under its old endpoint.
        by_id: dict[str, list[Orchestrator]] = {}
        for orchestrator in self._upstream.orchestrators():
            by_id.setdefault(orchestrator.id.partition("@")[0], []).append(orchestrator)
        for name, found in by_id.items():
            connected.add_metric((name,), int(any(each.can_take for each in found)))
            sent.add_metric((name,), sum(each.num_sent for each in found))
            in_flight.add_metric((name,), sum(each.num_in_flight for each in found))
        yield from (connected, sent, in_flight)
        yield CounterMetricFamily(
            "tensorway_gateway_reroutes", "Requests sent on after an orchestrator was lost or refused.", self._upstream.num_reroutes
        )

"""What every service tells Prometheus, whatever it does: who it is, whether it is ready, its links, and its registry."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Final

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tensorway.registry.outages import OUTAGES
from tensorway.transport.link_traffic import TRAFFIC

#: Of the distribution that is installed.
VERSION: Final = metadata.version("tensorway")
_SENT: Final = ("sent",)
_RECEIVED: Final = ("received",)


class MemberCollector(Collector):
    """Renders what is known anyway when Prometheus asks: nothing is paid per request."""

    def __init__(self, service: str, is_ready: Callable[[], bool], num_calls: Callable[[], int], metrics: CollectorRegistry) -> None:
        """`service` is gateway, orchestrator or node; `num_calls` tells the gRPC calls that its server has open."""
        self._service = service
        self._is_ready = is_ready
        self._num_calls = num_calls
        metrics.register(self)

    def collect(self) -> Iterable[Metric]:
        """The metrics as they are now; called for each scrape."""
        build = GaugeMetricFamily("tensorway_build_info", "Always 1; the labels say what runs.", labels=("service", "version", "python"))
        build.add_metric((self._service, VERSION, platform.python_version()), 1)
        yield build
        yield GaugeMetricFamily("tensorway_ready", "1 while /readyz says that the service can do its job.", int(self._is_ready()))
        yield GaugeMetricFamily("tensorway_grpc_open_calls", "gRPC calls that this server has open, streams too.", self._num_calls())
        yield from _links()
        yield CounterMetricFamily("tensorway_registry_errors", "Operations that the registry did not answer or could not do.",
                                  OUTAGES.num_errors)
        yield GaugeMetricFamily("tensorway_registry_reachable", "0 while the registry does not answer.", int(not OUTAGES.is_away))


def _links() -> Iterable[Metric]:
    traffic = TRAFFIC
    for name, said, sent, received in (
        ("frames", "Frames of links to other services.", traffic.num_sent_frames, traffic.num_received_frames),
        ("messages", "gRPC messages that carried frames of links.", traffic.num_sent_messages, traffic.num_received_messages),
        ("bytes", "Bytes of the messages of links.", traffic.num_sent_bytes, traffic.num_received_bytes),
    ):
        family = CounterMetricFamily(f"tensorway_link_{name}", said, labels=("direction",))
        family.add_metric(_SENT, sent)
        family.add_metric(_RECEIVED, received)
        yield family

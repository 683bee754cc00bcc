"""The table of every metric, made from the collectors themselves: what is not exported does not stand there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final, cast

from prometheus_client import CollectorRegistry, Metric, PlatformCollector, ProcessCollector

from tensorway.errors import Status
from tensorway.loads import ModelLoad
from tensorway.telemetry.ops_metrics import MemberCollector
from tensorway.telemetry.ops_tls import CertificateCollector
from tensorway.telemetry.tracing import TraceCollector, Tracer
from tensorway_gateway.identity.metrics import IdentityCollector
from tensorway_gateway.mesh_metrics import MeshCollector
from tensorway_gateway.statistics import Statistics, StatisticsCollector
from tensorway_orchestrator.metrics import LaneLevel, OrchestratorMetrics
from tensorway_orchestrator.pool_metrics import PoolCollector
from tensorway_orchestrator.roster_metrics import RosterCollector
from tensorway_worker.group_report import GroupReport, RankReport
from tensorway_worker.metrics import NodeCollector
from tensorway_worker.placement import Replica

#: Ends of names and their units; the others count.
_UNITS: Final = (
    ("timestamp_seconds", "seconds since 1970"), ("rows_per_second", "rows/s"), ("seconds", "seconds"), ("bytes", "bytes"),
    ("ratio", "0 to 1"), ("rows", "rows"), ("replicas", "replicas"),
)


def metric_table() -> Iterator[str]:
    """Every metric of every service: the shared ones first."""
    yield from ("| service | metric | type | labels | unit | meaning |", "| --- | --- | --- | --- | --- | --- |")
    for service, registry in (("all", _shared()), ("gateway", _gateway()), ("orchestrator", _orchestrator()), ("node", _node())):
        for family in registry.collect():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            said = family.documentation.rstrip(".") + "."
            yield f"| {service} | `{name}` | {family.type} | {_labels(family)} | {_unit(family.name)} | {said} |"


def _labels(family: Metric) -> str:
    # Families keep their labels to themselves until something is counted.
    names = dict.fromkeys(getattr(family, "_labelnames", ()))
    names |= dict.fromkeys(name for sample in family.samples for name in sample.labels if name != "le")
    return ", ".join(f"`{name}`" for name in names)


def _unit(name: str) -> str:
    return next((unit for end, unit in _UNITS if re.search(rf"_{end}$", name)), "")


def _shared() -> CollectorRegistry:
    registry = CollectorRegistry()
    MemberCollector("gateway", lambda: True, lambda: 0, registry)
    CertificateCollector(cast("Any", SimpleNamespace(material=lambda: SimpleNamespace(expires_s=0.0))), registry)
    tracer = Tracer()
    cast("Any", tracer).is_on = True
    TraceCollector(tracer, registry)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


def _gateway() -> CollectorRegistry:
    registry, statistics = CollectorRegistry(), Statistics()
    statistics.count("m", Status.OK, 1, 0.1)
    statistics.relay("m", 1, 0.1)
    StatisticsCollector(statistics, lambda: (0, 0), registry)
    nothing = SimpleNamespace(models={}, orchestrators=tuple, num_reroutes=0)
    MeshCollector(cast("Any", nothing), cast("Any", nothing), registry)
    gate = SimpleNamespace(num_authentications={}, num_denied={}, num_over_quota={}, num_reloads={}, audit=SimpleNamespace(num_lost=0))
    IdentityCollector(cast("Any", gate), registry)
    return registry


def _orchestrator() -> CollectorRegistry:
    registry = CollectorRegistry()
    metrics = OrchestratorMetrics(registry)
    metrics.lane("m")
    metrics.streams("m")
    metrics.levels = lambda: (LaneLevel("m", 0, 0, 0, 0),)
    metrics.loads((ModelLoad("m", "", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, is_called=False),), lambda _: 0)
    RosterCollector(lambda: (), registry)
    PoolCollector(tuple, lambda: 0, registry)
    return registry


def _node() -> CollectorRegistry:
    registry = CollectorRegistry()
    rank = RankReport(0, "n", device="cpu", memory_limit_bytes=1, num_free_blocks=1)
    report = GroupReport("g", Replica("m", "r", 0), ranks=(rank,))
    NodeCollector(lambda: (report,), 0, registry)
    return registry

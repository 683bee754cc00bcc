"""What Prometheus reads of identities and quotas."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from tensorway_gateway.identity.gate import Gate



class IdentityCollector(Collector):
    """Renders the gate's counts when Prometheus asks."""

    def __init__(self, gate: Gate, registry: CollectorRegistry) -> None:
        self._gate = gate
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """The metrics as they are now; called for each scrape."""
        gate = self._gate
        counted = (
            ("authentications", "Calls by the kind of credential that proved their caller, or by what was wrong with it.", "outcome",
             gate.num_authentications),
            ("permission_refusals", "Requests that their callers may not make, by action.", "action", gate.num_denied),
            ("quota_refusals", "Requests beyond their callers' quotas, by limit.", "limit", gate.num_over_quota),
            ("access_reloads", "New versions of the access file, by what became of them.", "outcome", gate.num_reloads),
        )  # fmt: skip
        for name, said, label, counts in counted:
            family = CounterMetricFamily(f"tensorway_gateway_{name}", said, labels=(label,))
            for value, number in list(counts.items()):
                family.add_metric((value,), number)
            yield family
        yield CounterMetricFamily("tensorway_gateway_audit_lost", "Lines of the audit log that could not be written.", gate.audit.num_lost)

"""How the groups stand, read from the rosters when somebody looks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from tensorway_orchestrator.group_record import Reading
from tensorway_orchestrator.roster import Roster


class RosterCollector(Collector):
    """`rosters` gives the model and the roster of each lane."""

    def __init__(self, rosters: Callable[[], Iterable[tuple[str, Roster]]], registry: CollectorRegistry) -> None:
        self._rosters = rosters
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """One look. Runs in the loop, like everything that changes a roster."""
        groups = GaugeMetricFamily(
            "tensorway_orchestrator_groups", "Groups that this orchestrator knows, by how they stand.", labels=("model", "state")
        )
        ejections = CounterMetricFamily(
            "tensorway_orchestrator_ejections", "Groups left out for a while, by reason.", labels=("model", "reason")
        )
        now_s = time.monotonic()
        states: dict[str, Counter[str]] = {}
        reasons: dict[str, Counter[str]] = {}
        for model, roster in self._rosters():
            # A model may have several revisions, each with a lane of its own.
            states.setdefault(model, Counter({reading.value: 0 for reading in Reading})).update(
                record.reading(now_s).value for record in roster
            )
            reasons.setdefault(model, Counter()).update({reason.value: number for reason, number in roster.ejections.items()})
        for model, by_state in states.items():
            for state, number in by_state.items():
                groups.add_metric((model, state), number)
        for model, by_reason in reasons.items():
            for reason, number in by_reason.items():
                ejections.add_metric((model, reason), number)
        yield groups
        yield ejections

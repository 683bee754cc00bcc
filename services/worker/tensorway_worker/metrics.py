"""What a node tells Prometheus of its groups and of their ranks, which have no port of their own: as the ranks' heartbeats say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tensorway_worker.group_report import GroupReport
from tensorway_worker.rank import launch as words
from tensorway_worker.supervisor import BACKING_OFF

_STATES: Final = (words.STARTING, words.LOADING, words.WARMING, words.READY, BACKING_OFF, words.STOPPING)
_GROUP: Final = ("model", "group")
_RANK: Final = ("model", "group", "rank", "device")


class NodeCollector(Collector):
    """Renders the supervisors' reports when Prometheus asks: nothing is paid per step."""

    def __init__(self, reports: Callable[[], Iterable[GroupReport]], num_devices: int, metrics: CollectorRegistry) -> None:
        """`reports` are of the groups that this node owns, with those of their ranks that other nodes host."""
        self._reports = reports
        self._num_devices = num_devices
        metrics.register(self)

    def collect(self) -> Iterable[Metric]:
        """The metrics as they are now; called for each scrape, in the loop."""
        reports = tuple(self._reports())
        yield GaugeMetricFamily("tensorway_node_devices", "CUDA devices of this node.", self._num_devices)
        yield from _groups(reports)
        yield from _ranks(reports)


def _groups(reports: tuple[GroupReport, ...]) -> Iterable[Metric]:
    epochs = CounterMetricFamily("tensorway_node_group_epochs", "Times that a group of this node was formed.", labels=_GROUP)
    states = GaugeMetricFamily("tensorway_node_group_state", "1 for the state that a group is in.", labels=(*_GROUP, "state"))
    running = GaugeMetricFamily("tensorway_node_running_answers", "Answers of tokens that advance in a group.", labels=_GROUP)
    waiting = GaugeMetricFamily("tensorway_node_waiting_answers", "Answers that wait in a group for a place or for blocks.", labels=_GROUP)
    free = GaugeMetricFamily("tensorway_node_free_blocks", "Blocks of keys and values that no answer holds.", labels=_GROUP)
    for report in reports:
        group = (report.replica.model, report.id)
        epochs.add_metric(group, report.epoch)
        for state in _STATES:
            states.add_metric((*group, state), int(state == report.state))
        if report.ranks:
            leader = report.ranks[0]
            # A group that makes batches has no blocks, and no answers either.
            if leader.num_free_blocks or leader.num_running_answers:
                running.add_metric(group, leader.num_running_answers)
                waiting.add_metric(group, leader.num_waiting_answers)
                free.add_metric(group, leader.num_free_blocks)
    return (epochs, states, running, waiting, free)


def _ranks(reports: tuple[GroupReport, ...]) -> Iterable[Metric]:
    ready = GaugeMetricFamily("tensorway_rank_ready", "1 while the rank serves.", labels=_RANK)
    steps = CounterMetricFamily("tensorway_rank_steps", "Steps that the rank has finished in this epoch.", labels=_RANK)
    busy = GaugeMetricFamily(
        "tensorway_rank_busy_ratio", "Share of the time between its last two heartbeats that its torch thread worked.", labels=_RANK
    )
    weights = GaugeMetricFamily("tensorway_rank_weights_bytes", "The rank's part of the model.", labels=_RANK)
    memory = GaugeMetricFamily(
        "tensorway_rank_memory_bytes", "Memory of the rank's device in use; on a CPU, its resident memory.", labels=_RANK
    )
    limit = GaugeMetricFamily("tensorway_rank_memory_limit_bytes", "Most that it may use; absent where there is no limit.", labels=_RANK)
    # Without the device, which may be another one in the next epoch: these counters outlive their ranks.
    spans = CounterMetricFamily(
        "tensorway_rank_trace_spans", "Spans of the rank by what became of them, over all epochs; as tensorway_trace_spans_total tells a "
        "service's own.", labels=(*_GROUP, "rank", "outcome"),
    )
    for report in reports:
        for index, num_exported, num_dropped in report.spans():
            spans.add_metric((report.replica.model, report.id, str(index), "exported"), num_exported)
            spans.add_metric((report.replica.model, report.id, str(index), "dropped"), num_dropped)
        for rank in report.ranks:
            labels = (report.replica.model, report.id, str(rank.rank), rank.device)
            ready.add_metric(labels, int(rank.state == words.READY))
            steps.add_metric(labels, rank.num_steps)
            busy.add_metric(labels, rank.busy_share)
            weights.add_metric(labels, rank.weights_bytes)
            memory.add_metric(labels, rank.memory_bytes)
            if rank.memory_limit_bytes:
                limit.add_metric(labels, rank.memory_limit_bytes)
    return (ready, steps, busy, weights, memory, limit, spans)

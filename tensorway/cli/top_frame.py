"""One frame of `tensorway top`, computed from two looks at the mesh. Pure: takes what was read, touches nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tensorway.load_report import LoadReport
from tensorway.registry.port import GATEWAY, NODE, ORCHESTRATOR, Registration

#: Labels of a sample, sorted.
Labels = tuple[tuple[str, str], ...]
#: The samples of one member, by name and labels.
Samples = Mapping[str, Mapping[Labels, float]]
_DURATION: Final = "tensorway_gateway_request_duration_seconds_bucket"
_FIRST: Final = "tensorway_gateway_first_delta_seconds_bucket"


@dataclass(frozen=True, slots=True)
class Look:
    """What was read of the mesh at one instant."""

    #: On the monotonic clock.
    at_s: float
    unix_s: float
    members: Sequence[Registration]
    loads: Sequence[LoadReport]
    #: By member; those whose ops port does not answer are missing.
    samples: Mapping[str, Samples]
    errors: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class MemberRow:
    """A gateway, an orchestrator or a node. None where its ops port does not tell."""

    kind: str
    id: str
    endpoint: str
    zone: str
    is_ready: bool | None
    version: str
    uptime_s: float | None
    #: Cores that it keeps busy.
    cpu: float | None
    memory_bytes: float | None
    #: Requests that it has not answered; of a node, its groups.
    num_open: float | None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model. Rates are over the time between the looks; of one that generates, p50 and p99 are those of the first token."""

    name: str
    num_ready: int
    num_wanted: int
    requests_per_s: float
    failures_per_s: float
    p50_s: float | None
    p99_s: float | None
    queued_rows: float
    batch_rows: float | None
    tokens_per_s: float | None
    utilisation: float


@dataclass(frozen=True, slots=True)
class RankRow:
    """One rank of a group, as its node tells it."""

    rank: int
    device: str
    is_ready: bool
    memory_bytes: float
    #: 0 where there is none.
    memory_limit_bytes: float
    steps_per_s: float
    busy: float


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One group."""

    id: str
    model: str
    node: str
    state: str
    epoch: int
    ranks: tuple[RankRow, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """Everything that is shown."""

    unix_s: float
    members: tuple[MemberRow, ...]
    models: tuple[ModelRow, ...]
    groups: tuple[GroupRow, ...]
    #: Newest first: unix_s, model, code, sentence, request_id.
    errors: tuple[Mapping[str, Any], ...]
    #: Members whose ops port does not answer.
    unreached: tuple[str, ...] = field(default=())


def frame_of(now: Look, before: Look) -> Frame:
    """What happened between two looks, and how things stand at the later one."""
    change = _Change(now, before)
    members = tuple(_member(one, now, change) for one in now.members if one.kind in (GATEWAY, ORCHESTRATOR, NODE))
    nodes = [one.id for one in now.members if one.kind == NODE]
    groups = tuple(row for node in nodes for row in _groups(node, now, change)) or tuple(_known_groups(now))
    unreached = tuple(row.id for row in members if row.id not in now.samples)
    errors = sorted(now.errors, key=lambda error: -float(error["unix_s"]))
    return Frame(now.unix_s, members, tuple(_model(load, now, change) for load in now.loads), groups, tuple(errors), unreached)


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float | None:
    """A quantile of a histogram, (upper bound, how many at or below it), linear within a bucket as Prometheus has it; None where it is
    empty."""
    ordered = sorted(buckets)
    if not ordered or ordered[-1][1] <= 0:
        return None
    wanted, low, below = share * ordered[-1][1], 0.0, 0.0
    for bound, at_most in ordered:
        if at_most >= wanted:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (wanted - below) / (at_most - below) if at_most > below else bound
        low, below = bound, at_most
    return low


class _Change:
    """Differences of counters. A member that has started anew counts from zero."""

    def __init__(self, now: Look, before: Look) -> None:
        self._now = now
        self._before = before
        self.took_s = max(1e-6, now.at_s - before.at_s)

    def of(self, name: str, member: str = "", **wanted: str) -> dict[Labels, float]:
        """By labels, summed over members, or of one; only those samples that have the `wanted` labels."""
        found: dict[Labels, float] = defaultdict(float)
        for id, samples in self._now.samples.items():
            old = self._before.samples.get(id)
            if (member and id != member) or old is None:
                continue
            was = old.get(name, {})
            for labels, value in samples.get(name, {}).items():
                if all((key, word) in labels for key, word in wanted.items()):
                    difference = value - was.get(labels, 0.0)
                    found[labels] += difference if difference >= 0 else value
        return found

    def rate(self, name: str, member: str = "", **wanted: str) -> float:
        return sum(self.of(name, member, **wanted).values()) / self.took_s


def _member(one: Registration, now: Look, change: _Change) -> MemberRow:
    samples = now.samples.get(one.id)
    zone = one.metadata.get("zone", "")
    if samples is None:
        return MemberRow(one.kind, one.id, one.endpoint, zone, None, "", None, None, None, None)
    names = {
        GATEWAY: "tensorway_gateway_in_flight_requests", ORCHESTRATOR: "tensorway_orchestrator_open_requests",
        NODE: "tensorway_node_group_epochs_total",
    }
    standing = samples.get(names[one.kind], {})
    began_s = _total(samples, "process_start_time_seconds")
    build: Labels = next(iter(samples.get("tensorway_build_info", {})), ())
    return MemberRow(
        one.kind, one.id, one.endpoint, zone, _total(samples, "tensorway_ready") > 0, dict(build).get("version", ""),
        now.unix_s - began_s if began_s else None, change.rate("process_cpu_seconds_total", one.id),
        _total(samples, "process_resident_memory_bytes"), len(standing) if one.kind == NODE else sum(standing.values()),
    )


def _model(load: LoadReport, now: Look, change: _Change) -> ModelRow:
    model = load.model
    requests = change.of("tensorway_gateway_requests_total", model=model)
    failed = sum(number for labels, number in requests.items() if ("code", "OK") not in labels)
    generates = any(("model", model) in labels for samples in now.samples.values() for labels in samples.get(_FIRST, ()))
    buckets: dict[float, float] = defaultdict(float)
    for labels, number in change.of(_FIRST if generates else _DURATION, model=model).items():
        buckets[float(dict(labels)["le"])] += number
    batches = sum(change.of("tensorway_orchestrator_batch_rows_count", model=model).values())
    rows = sum(change.of("tensorway_orchestrator_batch_rows_sum", model=model).values())
    has_gateway = any("tensorway_gateway_in_flight_requests" in samples for samples in now.samples.values())
    has_tokens = any(("model", model) in labels for samples in now.samples.values()
                     for labels in samples.get("tensorway_orchestrator_tokens_total", ()))
    return ModelRow(
        model, load.num_ready_replicas, load.num_wanted_replicas,
        sum(requests.values()) / change.took_s if has_gateway else load.arrival_rows_per_s, failed / change.took_s,
        quantile([*buckets.items()], 0.5), quantile([*buckets.items()], 0.99), load.waiting_rows, rows / batches if batches else None,
        change.rate("tensorway_orchestrator_tokens_total", model=model) if has_tokens else None, load.utilisation,
    )


def _groups(node: str, now: Look, change: _Change) -> Iterable[GroupRow]:
    samples = now.samples.get(node, {})
    states = {
        facts["group"]: facts["state"]
        for labels, value in samples.get("tensorway_node_group_state", {}).items() if value and (facts := dict(labels))
    }
    ranks: dict[str, list[RankRow]] = defaultdict(list)
    for group, row in _ranks(node, samples, change):
        ranks[group].append(row)
    for labels, epoch in samples.get("tensorway_node_group_epochs_total", {}).items():
        facts = dict(labels)
        id = facts["group"]
        yield GroupRow(id, facts["model"], node, states.get(id, ""), int(epoch), tuple(ranks[id]))


def _ranks(node: str, samples: Samples, change: _Change) -> Iterable[tuple[str, RankRow]]:
    """Every rank that a node tells of, with its group."""
    steps = change.of("tensorway_rank_steps_total", node)
    memory, limit, busy = (samples.get(f"tensorway_rank_{name}", {}) for name in ("memory_bytes", "memory_limit_bytes", "busy_ratio"))
    for labels, is_ready in samples.get("tensorway_rank_ready", {}).items():
        facts = dict(labels)
        yield facts["group"], RankRow(
            int(facts["rank"]), facts["device"], bool(is_ready), memory.get(labels, 0.0), limit.get(labels, 0.0),
            steps.get(labels, 0.0) / change.took_s, busy.get(labels, 0.0),
        )


def _known_groups(now: Look) -> Iterable[GroupRow]:
    """What the registry tells where no node's ops port answers."""
    for one in now.members:
        if one.kind not in (GATEWAY, ORCHESTRATOR, NODE):
            words = one.metadata
            yield GroupRow(one.id, words.get("model", ""), words.get("node", ""), "ready", int(words.get("epoch", "0")), ())


def _total(samples: Samples, name: str) -> float:
    return sum(samples.get(name, {}).values())

"""What a node says of its groups: to the registry, to NodeService, and to its log."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from tensorway_worker.placement import Replica
from tensorway_worker.rank import launch as words


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank of a group, as it was last heard of."""

    rank: int
    #: Id of the node that hosts it.
    node: str
    #: On that node; 0 before it has been started.
    pid: int = 0
    #: `cpu`, `cuda:N`, or several of these joined by commas, as that node numbers them.
    device: str = ""
    state: str = words.STARTING
    detail: str = ""
    #: Progress of the state, 0 to 1; negative where unknown.
    fraction: float = -1.0
    num_steps: int = 0
    weights_bytes: int = 0
    memory_bytes: int = 0
    #: 0 where there is no limit.
    memory_limit_bytes: int = 0
    #: Share of the time since the last heartbeat, 0 to 1.
    busy_share: float = 0.0
    #: Of the leader of a group that generates: answers that advance, answers that wait, and blocks that no answer holds.
    num_running_answers: int = 0
    num_waiting_answers: int = 0
    num_free_blocks: int = 0
    #: In this epoch.
    num_exported_spans: int = 0
    num_dropped_spans: int = 0


@dataclass(slots=True)
class GroupReport:
    """What the node says of one group. Changed in place by its supervisor."""

    id: str
    replica: Replica
    epoch: int = 0
    state: str = words.STARTING
    #: What it does now, e.g. which rank loads what.
    detail: str = ""
    fraction: float = -1.0
    #: Why the last epoch ended, with the guilty rank's own last lines; empty once the group serves.
    reason: str = ""
    endpoint: str = ""
    num_steps: int = 0
    ranks: tuple[RankReport, ...] = field(default=())
    #: Spans that ranks of ended epochs have exported and dropped, by rank: counters that Prometheus reads never go down.
    past_spans: dict[int, tuple[int, int]] = field(default_factory=dict)

    def forget_ranks(self) -> None:
        """The epoch's ranks are gone; what they have counted stays. Harmless to repeat."""
        self.past_spans = {rank: (num_exported, num_dropped) for rank, num_exported, num_dropped in self.spans()}
        self.ranks = ()

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """Over all epochs: each rank, the spans that it has exported, and those that it has dropped."""
        present = {one.rank: (one.num_exported_spans, one.num_dropped_spans) for one in self.ranks}
        for rank in sorted({*self.past_spans, *present}):
            counts = [of.get(rank, (0, 0)) for of in (self.past_spans, present)]
            yield rank, sum(exported for exported, _ in counts), sum(dropped for _, dropped in counts)

    def to_document(self) -> dict[str, Any]:
        """As it stands in the node's document in the registry."""
        values = asdict(self)
        replica = values.pop("replica")
        values.pop("past_spans")  # only Prometheus asks for them
        return {**values, "model": replica["model"], "revision": replica["revision"]}

"""What a node says of its groups: to the registry, to NodeService, and to its log."""

from __future__ import annotations

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

    def to_document(self) -> dict[str, Any]:
        """As it stands in the node's document in the registry."""
        values = asdict(self)
        replica = values.pop("replica")
        return {**values, "model": replica["model"], "revision": replica["revision"]}

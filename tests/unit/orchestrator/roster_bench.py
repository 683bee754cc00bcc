"""A roster on a clock of its own, for tests."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tensorway_orchestrator.group_record import GroupRecord, SentBatch
from tensorway_orchestrator.roster import Roster
from tensorway_orchestrator.routing_policy import RoutingPolicy
from tensorway_orchestrator.standing import Failure

#: Nothing warms up, where that is not the matter.
WARM = RoutingPolicy(slow_start_s=0.0)


@dataclass
class Bench:
    """Groups that are joined and connected, and a clock that tests move."""

    num_groups: int = 0
    policy: RoutingPolicy = WARM
    zone: str = ""
    max_rows: int = 8
    seed: int = 1
    now_s: float = 100.0
    roster: Roster = field(init=False)

    def __post_init__(self) -> None:
        self.roster = Roster(self.max_rows, random.Random(self.seed).randrange, zone=self.zone, policy=self.policy)
        for index in range(self.num_groups):
            self.add(f"g{index}")

    def add(self, name: str, zone: str = "", *, has_history: bool = False) -> GroupRecord:
        """A group that is connected."""
        record = self.roster.join(name, zone, has_history=has_history)
        self.roster.opened(record, self.now_s)
        return record

    def __getitem__(self, name: str) -> GroupRecord:
        record = self.roster.find(name)
        assert record is not None
        return record

    def choose(self, rows: int = 1, *avoid: str) -> str | None:
        """The id of the group chosen."""
        record = self.roster.choose(rows, avoid, self.now_s)
        return None if record is None else record.id

    def send(self, name: str, rows: int = 1) -> SentBatch:
        """A batch that the group has now."""
        return self.roster.began(self[name], rows, self.now_s)

    def answer(self, batch: SentBatch, step_s: float) -> None:
        """The answer, `step_s` after now or when it is."""
        self.now_s = max(self.now_s, batch.sent_s + step_s)
        self.roster.ended(batch, self.now_s)
        self.roster.observed(batch, step_s, 0.0, self.now_s)

    def lose(self, batch: SentBatch, failure: Failure = Failure.LOST) -> None:
        """The batch comes to nothing, now."""
        self.roster.ended(batch, self.now_s)
        self.roster.failed(batch, failure, self.now_s)

    def run(self, name: str, step_s: float, num_steps: int = 1, rows: int = 1) -> None:
        """Steps, one after the other."""
        for _ in range(num_steps):
            self.answer(self.send(name, rows), step_s)

    def fail(self, name: str, num_failures: int) -> None:
        """Batches lost, one after the other."""
        for _ in range(num_failures):
            batch = self.send(name)
            self.now_s += 0.01
            self.lose(batch)

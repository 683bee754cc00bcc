"""Rank processes as a node runs them, with a meeting of their own, and a witness of all they do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tensorway_worker.meeting import Answer, Meeting
from tensorway_worker.rank.launch import RankLaunch, RankStatus
from tensorway_worker.rank_process import RankProcess

MEETING_RANK = Path(__file__).parent / "meeting_rank.py"
WAIT_S = 60.0


def launch_of(rank: int, world_size: int, model: str = "") -> RankLaunch:
    """Orders for a rank that loads nothing; `model` tells the program what to do."""
    return RankLaunch(
        model_path="", model=model, revision="", group="g", epoch=1, rank=rank, world_size=world_size, pipeline=world_size, tensor=1,
        node="n", registry="", listen="", advertise_host="", threads=1, device="cpu", transport="aio", max_message_bytes=1,
        heartbeat_s=0.1, grace_s=1.0, log_level="info", log_format="json", secret="0" * 64, local_rank=rank, local_world_size=world_size,
    )


@dataclass
class Witness:
    """Implements `RankEvents`: writes down everything, and lets the ranks meet."""

    meeting: Meeting = field(default_factory=lambda: Meeting(asyncio.get_running_loop().call_later))
    statuses: list[tuple[int, RankStatus]] = field(default_factory=list)
    lines: list[tuple[int, str]] = field(default_factory=list)
    exits: dict[int, int] = field(default_factory=dict)
    num_operations: int = 0
    #: Set at every event.
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def on_status(self, rank: int, status: RankStatus) -> None:
        self.statuses.append((rank, status))
        self.news.set()

    def on_output(self, rank: int, line: str) -> None:
        self.lines.append((rank, line))
        self.news.set()

    def on_operation(self, rank: int, line: bytes, answer: Answer) -> None:
        self.num_operations += 1
        self.meeting.take(line, answer)

    def on_exit(self, rank: int, code: int) -> None:
        self.exits[rank] = code
        self.news.set()

    async def until_printed(self, rank: int, words: str) -> None:
        async with asyncio.timeout(WAIT_S):
            while not any(one == rank and words in line for one, line in self.lines):
                assert rank not in self.exits, self.lines
                self.news.clear()
                await self.news.wait()


@asynccontextmanager
async def met(witness: Witness, launches: Sequence[RankLaunch]) -> AsyncIterator[list[RankProcess]]:
    """Ranks that run `meeting_rank.py`; kills what is left of them."""
    ranks = [await RankProcess.start(launch, {}, (str(MEETING_RANK),)) for launch in launches]
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(rank.run(witness)) for rank in ranks]
            yield ranks
            for task in running:
                task.cancel()
    finally:
        for rank in ranks:
            await rank.kill()

"""A block of ranks that run on this node."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from tensorway_worker.hosted_rank import BlockLost, RankEvents, StartedRank, name_of
from tensorway_worker.meeting import Answer
from tensorway_worker.orders import Launch
from tensorway_worker.rank.launch import RankStatus
from tensorway_worker.rank_process import RankProcess

_LOG = logging.getLogger(__name__)
#: Once the leader has ended, nothing that the others could do is of use.
_FOLLOWER_GRACE_S: Final = 2.0


@dataclass(slots=True, eq=False)
class LocalBlock:
    """Implements `Block` with processes of this node."""

    node: str
    launches: Sequence[Launch]
    #: Of each rank, as the node numbers them.
    devices: Sequence[tuple[str, ...]]
    _processes: list[RankProcess] = field(default_factory=list)

    @property
    def ranks(self) -> range:
        first = self.launches[0][0].rank
        return range(first, first + len(self.launches))

    async def start(self) -> tuple[StartedRank, ...]:
        started: list[StartedRank] = []
        for (launch, environment), devices in zip(self.launches, self.devices, strict=True):
            try:
                process = await RankProcess.start(launch, environment)
            except OSError as error:
                raise BlockLost(f"{name_of(launch.rank, self.node)} cannot be started: {error}") from error
            self._processes.append(process)
            started.append(StartedRank(launch.rank, process.process.pid, ",".join(devices)))
        return tuple(started)

    async def run(self, events: RankEvents) -> None:
        async with asyncio.TaskGroup() as tasks:
            for process in self._processes:
                tasks.create_task(process.run(events))

    async def stop(self, grace_s: float) -> None:
        processes, self._processes = self._processes, []
        leaders = [process for process in processes if process.launch.rank == 0]
        others = [process for process in processes if process.launch.rank != 0]
        try:
            async with asyncio.TaskGroup() as tasks:
                # What the ranks say while they end must be read, or they block on their full pipes.
                followed = [tasks.create_task(process.run(_LastWords())) for process in processes]
                await asyncio.gather(*(process.stop(grace_s) for process in leaders))
                await asyncio.gather(*(process.stop(min(grace_s, _FOLLOWER_GRACE_S) if leaders else grace_s) for process in others))
                await asyncio.gather(*followed)
        finally:
            for process in processes:
                await process.kill()


class _LastWords:
    """Implements `RankEvents` for ranks that are being ended: what they print is printed, nothing else matters any more."""

    def on_status(self, rank: int, status: RankStatus) -> None:
        _LOG.debug("rank %d is %s", rank, status.state)

    def on_output(self, rank: int, line: str) -> None:
        """It has been printed already."""

    def on_operation(self, rank: int, line: bytes, answer: Answer) -> None:
        """An epoch that ends has no store any more."""

    def on_exit(self, rank: int, code: int) -> None:
        _LOG.debug("rank %d has ended with %d", rank, code)

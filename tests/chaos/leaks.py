"""What a mesh holds that it should not: processes that belong to nobody, and file descriptors that only grow."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Final

from tests.chaos.processes import descriptors, marked
from tests.chaos.world import World

#: Descriptors of one kind that may come and go with connections, and more for each rank that a node has taken on.
SLACK: Final = 12
_PER_RANK: Final = 8
_LOOK_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Holdings:
    """Open descriptors of every service by kind, and the ranks of every node; by name and process id."""

    descriptors: dict[tuple[str, int], Counter[str]]
    num_ranks: Counter[str]

    @classmethod
    async def of(cls, world: World) -> Holdings:
        """What is held now."""
        found = {(member.name, member.pid): descriptors(member.pid) for member in world.members.values() if member.is_running}
        return cls(found, Counter(group.metadata["node"] for group in await world.groups()))

    def grown(self, later: Holdings) -> list[str]:
        """Services that have lived on and hold more than they did."""
        grown = []
        for (name, pid), before in self.descriptors.items():
            now = later.descriptors.get((name, pid), Counter())
            bound = SLACK + _PER_RANK * max(0, later.num_ranks[name] - self.num_ranks[name])
            grown += [
                f"{name} held {before[kind]} {kind} descriptors and holds {number}"
                for kind, number in now.items() if number > before[kind] + bound
            ]
        return grown


async def strays(world: World, patience_s: float = 10.0) -> list[str]:
    """Processes of the run that are no service, no rank that a node knows of, and no Consul server, and do not end within that time."""
    found: set[int] = set()
    try:
        async with asyncio.timeout(patience_s):
            while found := await _unknown(world):
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        return [f"process {pid} belongs to nobody" for pid in sorted(found)]
    return []


async def _unknown(world: World) -> set[int]:
    running = marked(world.mark)
    known = {member.pid for member in world.members.values() if member.is_running} | await world.rank_pids()
    known |= {server.process.pid for server in world.servers.values() if server.process is not None}
    return running & marked(world.mark) - known

"""Whom a fault strikes: one of those that its words mean, mostly one that does the work."""

from __future__ import annotations

import random
from typing import Final

from tests.chaos.processes import Member
from tests.chaos.world import World
from tests.consul.agent import Agent

#: Whom a fault strikes, besides services: the leader rank of a model, a node that runs one, or a Consul server by its part.
RANK: Final = "rank of "
NODE_OF: Final = "node of "
CONSUL_LEADER: Final = "consul leader"
CONSUL_FOLLOWER: Final = "consul follower"


async def pick(world: World, whom: str, chance: random.Random) -> Member | Agent | int:
    """One of those that `whom` means: a service, a Consul server, or the process id of a rank."""
    if whom.startswith((RANK, NODE_OF)):
        model = whom.removeprefix(RANK).removeprefix(NODE_OF)
        found = {int(group.metadata["pid"]): group.metadata["node"] for group in await world.groups() if group.metadata["model"] == model}
        pid = chance.choices(list(found), [_weight(world, pid) for pid in found])[0]
        return pid if whom.startswith(RANK) else world.members[found[pid]]
    if whom in (CONSUL_LEADER, CONSUL_FOLLOWER):
        assert world.cluster is not None
        return await (world.cluster.leader() if whom == CONSUL_LEADER else world.cluster.follower())
    members = world.of(whom)
    return chance.choices(members, [_weight(world, member.pid) for member in members])[0]


def _weight(world: World, pid: int) -> int:
    """How likely a fault strikes a process: mostly those who do the work."""
    return 1 + world.work.get(pid, 0) ** 2


async def host_of(world: World, whom: str, chance: random.Random) -> str:
    """The name of the host of one of those that `whom` means."""
    target = await pick(world, whom, chance)
    if isinstance(target, Agent):
        return next(name for name, server in world.servers.items() if server is target)
    assert isinstance(target, Member)
    return target.name

"""What is done to a mesh: each fault is data, is done by `inject`, and is made good by `undo`."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

from tensorway.registry.port import GATEWAY, NODE, ORCHESTRATOR
from tests.chaos.clock import carry_clock, drop_clock, jump_clock
from tests.chaos.processes import marked
from tests.chaos.victims import RANK, host_of, pick
from tests.chaos.world import World
from tests.consul.agent import Agent

#: Patience with a service that drains, or with a mesh that is to be whole again between two steps of one fault.
_STEP_S: Final = 60.0

Undo = Callable[[], Awaitable[None]]


class Fault(Protocol):
    """Something that goes wrong."""

    @property
    def needs(self) -> frozenset[str]:
        """What a world must have for it: see `scenarios.obstacle`."""

    async def prepare(self, world: World) -> None:
        """Makes what has to be so before the undisturbed time begins."""

    async def inject(self, world: World, chance: random.Random) -> tuple[str, Undo]:
        """Does it. Returns to whom, in a few words, and what makes it good."""


@dataclass(frozen=True, slots=True)
class _Unprepared:
    """A fault that needs no preparation."""

    async def prepare(self, world: World) -> None:
        return


@dataclass(frozen=True, slots=True)
class Kill(_Unprepared):
    """SIGKILL; made good by starting it again, which a rank's node does by itself."""

    whom: str

    @property
    def needs(self) -> frozenset[str]:
        return _needs(self.whom)

    async def inject(self, world: World, chance: random.Random) -> tuple[str, Undo]:
        target = await pick(world, self.whom, chance)
        if isinstance(target, int):
            os.kill(target, signal.SIGKILL)
            return f"pid {target}", _nothing
        if isinstance(target, Agent):
            await target.kill()
        else:
            await target.end(signal.SIGKILL, _STEP_S)
        return target.name, target.start


@dataclass(frozen=True, slots=True)
class Stop(_Unprepared):
    """SIGSTOP, which leaves every connection open and answers nothing; made good by SIGCONT."""

    whom: str

    @property
    def needs(self) -> frozenset[str]:
        return _needs(self.whom)

    async def inject(self, world: World, chance: random.Random) -> tuple[str, Undo]:
        target = await pick(world, self.whom, chance)
        pid = target if isinstance(target, int) else target.process.pid if target.process is not None else 0
        os.kill(pid, signal.SIGSTOP)

        async def go_on() -> None:
            if pid in marked(world.mark):  # its node may have killed it meanwhile
                os.kill(pid, signal.SIGCONT)

        return f"pid {pid}" if isinstance(target, int) else target.name, go_on


@dataclass(frozen=True, slots=True)
class Cut(_Unprepared):
    """Nothing passes between two hosts. With `reset`, TCP is told so."""

    one: str
    other: str
    reset: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return _needs(self.one) | _needs(self.other) | {"network"}

    async def inject(self, world: World, chance: random.Random) -> tuple[str, Undo]:
        one, other = await host_of(world, self.one, chance), await host_of(world, self.other, chance)
        world.hosts.cut(one, other, reset=self.reset)
        return f"{one} and {other}", _healing(world)


@dataclass(frozen=True, slots=True)
class Isolate(_Unprepared):
    """Nothing passes between a host and all others."""

    whom: str

    @property
    def needs(self) -> frozenset[str]:
        return _needs(self.whom) | {"network"}

    async def inject(self, world: World, chance: random.Random) -> tuple[str, Undo]:
        name = await host_of(world, self.whom, chance)
        world.hosts.isolate(name)
        return name, _healing(world)


@dataclass(frozen=True, slots=True)
class Lose(_Unprepared):
    """A share of the packets to a host is lost."""

    whom: str
    share: float
    needs = frozenset({"network"})

    async def inject(self, world: World, chance: random.Random) -> tuple[str, Undo]:
        name = await host_of(world, self.whom, chance)
        world.hosts.lose(name, self.share)
        return name, _healing(world)


@dataclass(frozen=True, slots=True)
class Slow(_Unprepared):
    """What leaves a host is shaped to so many kbit/s."""

    whom: str
    kbit_s: int
    needs = frozenset({"network"})

    async def inject(self, world: World, chance: random.Random) -> tuple[str, Undo]:
        name = await host_of(world, self.whom, chance)
        world.hosts.slow(name, self.kbit_s)
        return name, _healing(world)


@dataclass(frozen=True, slots=True)
class Roll(_Unprepared):
    """Every service is restarted, one after another: SIGTERM, started again once it has ended, the next once every service says that it is
    SERVING, which is all that a deployment tool sees."""

    needs = frozenset[str]()

    async def inject(self, world: World, chance: random.Random) -> tuple[str, Undo]:
        told = []
        for member in world.members.values():
            if not await member.end(signal.SIGTERM, _STEP_S):
                told.append(f"{member.name} did not end on SIGTERM")
            await member.start()
            if lack := await world.wait_ready(_STEP_S):
                told.append(f"after {member.name}: {lack}")
        return "; ".join(told) or f"all {len(world.members)} services", _nothing


@dataclass(frozen=True, slots=True)
class FillDisk(_Unprepared):
    """Not a byte is free in the registry directory while a leader dies, whose group has to be registered anew."""

    model: str
    needs = frozenset({"small disk"})

    async def inject(self, world: World, chance: random.Random) -> tuple[str, Undo]:
        filler = world.registry_dir / "filler"
        with filler.open("wb", buffering=0) as file:
            for size in (65536, 4096, 1):
                while _has_room(file.fileno(), size):
                    pass

        async def empty() -> None:
            filler.unlink()

        told, _ = await Kill(RANK + self.model).inject(world, chance)
        return told, empty


@dataclass(frozen=True, slots=True)
class Jump:
    """The wall clock of one service of each kind, and of its ranks, jumps; made good by jumping back."""

    seconds: int
    needs = frozenset({"compiler"})

    async def prepare(self, world: World) -> None:
        for service in (GATEWAY, ORCHESTRATOR, NODE):
            member = world.of(service)[0]
            carry_clock(member, world.folder)
            await member.end(signal.SIGTERM, _STEP_S)
            await member.start()
            drop_clock(member)

    async def inject(self, world: World, chance: random.Random) -> tuple[str, Undo]:
        jump_clock(world.folder, self.seconds)

        async def jump_back() -> None:
            jump_clock(world.folder, 0)

        return f"{self.seconds:+d} s", jump_back


@dataclass(frozen=True, slots=True)
class StopConsul(_Unprepared):
    """Every Consul server is stopped."""

    needs = frozenset({"consul"})

    async def inject(self, world: World, chance: random.Random) -> tuple[str, Undo]:
        for server in world.servers.values():
            server.stop()

        async def go_on() -> None:
            for server in world.servers.values():
                server.cont()

        return "all servers", go_on


@dataclass(frozen=True, slots=True)
class ResetConsul(_Unprepared):
    """Every Consul server is killed and comes back with empty hands, at once."""

    needs = frozenset({"consul"})

    async def inject(self, world: World, chance: random.Random) -> tuple[str, Undo]:
        for server in world.servers.values():
            await server.kill()
        for server in world.servers.values():
            shutil.rmtree(server.folder / "state", ignore_errors=True)
            await server.start()
        return "all servers", _nothing


async def _nothing() -> None:
    """What makes good a fault that heals by itself."""


def _healing(world: World) -> Undo:
    async def heal() -> None:
        world.hosts.heal()

    return heal


def _needs(whom: str) -> frozenset[str]:
    return frozenset({"consul"}) if whom.startswith("consul") else frozenset()


def _has_room(descriptor: int, num_bytes: int) -> bool:
    """Takes so many bytes; False where they are not free."""
    try:
        return os.write(descriptor, bytes(num_bytes)) == num_bytes
    except OSError:
        return False

"""A mesh on this machine: gateway, orchestrator and node as separate processes with a directory registry, started and stopped together."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from tensorway.errors import Unavailable
from tensorway.process import MALLOC_SETTINGS

#: Order of starting; stopping goes the same way, so that each service drains into the next.
MODULES: Final = {"gateway": "tensorway_gateway", "orchestrator": "tensorway_orchestrator", "node": "tensorway_worker"}
_LAST_BYTES: Final = 2000


@dataclass(frozen=True, slots=True)
class MemberPlan:
    """One process of the mesh: its name (also its log file's), which service it is, and its flags."""

    name: str
    service: str
    flags: tuple[str, ...]


def flags_of(settings: Mapping[str, object]) -> tuple[str, ...]:
    """`{"max_rows": 3}` as `("--max-rows=3",)`."""
    return tuple(f"--{name.replace('_', '-')}={value}" for name, value in settings.items())


@dataclass(slots=True, eq=False)
class Member:
    """A started process."""

    plan: MemberPlan
    process: asyncio.subprocess.Process
    log: Path

    def last_lines(self) -> str:
        """The end of its log, for an error message."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _LAST_BYTES))
            return file.read().decode("utf-8", "replace").strip()


@dataclass(slots=True, eq=False)
class LocalMesh:
    """Use as an async context manager: leaving it stops every process, the impatient way after `grace_s`."""

    log_dir: Path
    grace_s: float = 35.0
    members: dict[str, Member] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        self.log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self, plans: Sequence[MemberPlan]) -> None:
        for plan in plans:
            await self.start_member(plan)

    async def start_member(self, plan: MemberPlan) -> Member:
        """Starts one process; its output goes to its log file."""
        log = self.log_dir / f"{plan.name}.log"
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tensorway.cli.tethered", str(os.getpid()), MODULES[plan.service], *plan.flags,
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                env={**MALLOC_SETTINGS, **os.environ}, start_new_session=True,
            )
        member = self.members[plan.name] = Member(plan, process, log)
        return member

    async def watch(self) -> None:
        """Waits for as long as every process lives. Raises Unavailable naming the first that ended, with its last lines."""
        waits = {asyncio.ensure_future(member.process.wait()): member for member in self.members.values()}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        member = waits[next(iter(done))]
        raise Unavailable(
            f"{member.plan.name} ended with status {member.process.returncode}; the end of {member.log}:\n{member.last_lines()}"
        )

    async def stop(self) -> None:
        """SIGTERM to one service after another, so that each drains into the next; SIGKILL for what outlives the grace."""
        for member in tuple(self.members.values()):
            await self.stop_member(member)
        self.members.clear()

    async def stop_member(self, member: Member) -> None:
        process = member.process
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(self.grace_s):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        self.members.pop(member.plan.name, None)

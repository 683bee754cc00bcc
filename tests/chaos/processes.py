"""Processes of a test mesh: started on their hosts, signalled for real, found again by a mark, and ended for certain."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tensorway.cli.local_mesh import MODULES
from tensorway.process import MALLOC_SETTINGS
from tests.chaos.hosts import PREFIX, Host, end_process

#: Every process of a run has this in its environment, as has whatever it starts.
MARK: Final = "TWCHAOS_RUN"


@dataclass(slots=True, eq=False)
class Member:
    """One service of the mesh: how it is started, and the process that it is now."""

    name: str
    #: `gateway`, `orchestrator` or `node`.
    service: str
    host: Host
    endpoint: str
    flags: tuple[str, ...]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    num_starts: int = 0

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def start(self) -> None:
        """Starts the process; its output is added to its log."""
        assert not self.is_running, f"{self.name} runs already"
        with self.log.open("ab") as output:
            self.process = await asyncio.create_subprocess_exec(
                *self.host.prefix, sys.executable, "-m", "tensorway.cli.tethered", str(os.getpid()), MODULES[self.service], *self.flags,
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                env={**MALLOC_SETTINGS, **os.environ, **self.environment}, start_new_session=True,
            )
        self.num_starts += 1

    def send_signal(self, number: signal.Signals) -> None:
        """Harmless where the process has ended."""
        if self.is_running and self.process is not None:
            self.process.send_signal(number)

    async def end(self, number: signal.Signals, patience_s: float) -> bool:
        """Sends a signal and waits for the end, which SIGKILL brings where it takes too long; says whether it came by itself."""
        if self.process is None:
            return True
        self.send_signal(number)
        try:
            async with asyncio.timeout(patience_s):
                await self.process.wait()
        except TimeoutError:
            self.send_signal(signal.SIGKILL)
            await self.process.wait()
            return False
        return True

    def last_lines(self, num_bytes: int = 3000) -> str:
        """The end of its log."""
        return self.log.read_bytes()[-num_bytes:].decode("utf-8", "replace") if self.log.exists() else ""


def marked(mark: str) -> set[int]:
    """Every process of a run that lives, zombies left out."""
    wanted = f"{MARK}={mark}".encode()
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.add(int(folder.name))
            except OSError:
                continue  # it has ended, or is somebody else's
    return found


def end_marked(mark: str, spared: Collection[int] = ()) -> None:
    """SIGKILL to whatever is left of a run, those excepted whom somebody else ends."""
    for pid in marked(mark).difference(spared):
        end_process(pid)


def end_leftovers() -> None:
    """Ends what runs whose own process is gone have left behind."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                found = re.search(rf"(?:^|\0){MARK}={PREFIX}-(\d+)-".encode(), (folder / "environ").read_bytes())
            except OSError:
                continue  # it has ended, or is somebody else's
            if found and not Path(f"/proc/{int(found[1])}").exists():
                end_process(int(folder.name))


def cpu_ticks(pid: int) -> int:
    """CPU time that a process has used, in ticks of 10 ms; 0 where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])  # utime and stime of proc(5)


def descriptors(pid: int) -> Counter[str]:
    """Open file descriptors of a process by kind (`socket`, `pipe`, `anon_inode`, `file`); none where it has ended."""
    found: Counter[str] = Counter()
    for number in _listed(Path(f"/proc/{pid}/fd")):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{number}")
        except OSError:
            continue  # closed since it was listed
        found["file" if target.startswith("/") else target.partition(":")[0]] += 1
    return found


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []

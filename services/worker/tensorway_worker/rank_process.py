"""One rank process as its node sees it: started, listened to, and ended for certain."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from tensorway.process import MALLOC_SETTINGS
from tensorway_worker.rank.launch import STATUS_FD_VARIABLE, RankLaunch, RankStatus

_LOG = logging.getLogger("tensorway_worker.rank")
_LAST_LINES: Final = 20


@dataclass(slots=True, eq=False)
class RankProcess:
    """A started rank. `run` owns it: whoever leaves `run` leaves no process behind."""

    launch: RankLaunch
    process: asyncio.subprocess.Process
    _status: asyncio.StreamReader
    _transport: asyncio.ReadTransport
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))

    @classmethod
    async def start(cls, launch: RankLaunch, environment: Mapping[str, str]) -> RankProcess:
        """Starts the process and hands it its orders."""
        read_fd, write_fd = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tensorway_worker.rank",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
                env={**MALLOC_SETTINGS, **os.environ, **environment, STATUS_FD_VARIABLE: str(write_fd)},
                pass_fds=(write_fd,),
                start_new_session=True,  # Ctrl-C in a terminal is the node's to handle: it drains its ranks
            )
        finally:
            os.close(write_fd)
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb", 0)
        )
        assert process.stdin is not None
        process.stdin.write(launch.to_json().encode() + b"\n")
        return cls(launch, process, reader, transport)

    async def statuses(self) -> AsyncIterator[RankStatus]:
        """What the rank says of itself, until it ends."""
        while line := await self._status.readline():
            yield RankStatus.from_json(line.decode())

    async def follow_output(self, on_line: Callable[[str], None] | None = None) -> None:
        """Passes on what the rank prints, and keeps the last lines, until its output ends."""
        assert self.process.stdout is not None
        while raw := await _read_line(self.process.stdout):
            line = raw.decode("utf-8", "replace").rstrip()
            self.last_lines.append(line)
            if on_line is not None:
                on_line(line)
            print(line, file=sys.stderr, flush=True)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL to the whole session once the grace is over. Returns when the process has been reaped."""
        try:
            if self.process.returncode is None and grace_s > 0:
                self.process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(grace_s):
                    await self.process.wait()
        except (TimeoutError, ProcessLookupError):
            _LOG.warning("rank %d of group %s did not end in %.1f s and is killed", self.launch.rank, self.launch.group, grace_s)
        finally:
            await self.kill()

    async def kill(self) -> None:
        """Ends it now, with everything it has started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # the whole session has ended already
        await self.process.wait()
        self._transport.close()
        if self.process.stdin is not None:
            self.process.stdin.close()

    def end_reason(self) -> str:
        """One sentence on how it ended."""
        code = self.process.returncode
        if code is None:
            return f"rank {self.launch.rank} runs"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        said = " | ".join(list(self.last_lines)[-5:])
        return f"rank {self.launch.rank} {how}" + (f"; its last lines: {said}" if said else "")


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    """The next line; an overlong one is cut instead of ending the reading."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.read(error.consumed) or b"\n"

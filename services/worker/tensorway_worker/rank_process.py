"""One rank process as its node sees it: started, listened to, and ended for certain."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tensorway.process import MALLOC_SETTINGS
from tensorway_worker.hosted_rank import RankEvents
from tensorway_worker.meeting import MAX_LINE_BYTES
from tensorway_worker.rank.launch import STATUS_FD_VARIABLE, STORE_FD_VARIABLE, RankLaunch, RankStatus

_LOG = logging.getLogger("tensorway_worker.rank")
#: What an ended rank has written last is read for so long: a child of it may hold the other end open.
_LAST_WORDS_S: Final = 0.1
#: What Python runs for a rank.
RANK_PROGRAM: Final = ("-m", "tensorway_worker.rank")


@dataclass(slots=True, eq=False)
class RankProcess:
    """A started rank. Who starts it must `kill` it; that leaves no process behind."""

    launch: RankLaunch
    process: asyncio.subprocess.Process
    _status: asyncio.StreamReader
    _store: asyncio.StreamReader
    _transports: tuple[asyncio.ReadTransport, ...]

    @classmethod
    async def start(cls, launch: RankLaunch, environment: Mapping[str, str], program: Sequence[str] = RANK_PROGRAM) -> RankProcess:
        """Starts the process and hands it its orders. Raises OSError where it cannot be started."""
        status_read, status_write = os.pipe()
        store_read, store_write = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *program,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
                env={
                    **MALLOC_SETTINGS, **os.environ, **environment,
                    STATUS_FD_VARIABLE: str(status_write), STORE_FD_VARIABLE: str(store_write),
                },
                pass_fds=(status_write, store_write),
                start_new_session=True,  # Ctrl-C in a terminal is the node's to handle: it drains its ranks
            )
        except BaseException:
            os.close(status_read)
            os.close(store_read)
            raise
        finally:
            os.close(status_write)
            os.close(store_write)
        try:
            status, status_transport = await _reader_of(status_read)
            store, store_transport = await _reader_of(store_read)
        except BaseException:
            process.kill()
            await process.wait()
            raise
        started = cls(launch, process, status, store, (status_transport, store_transport))
        started._write(launch.to_json().encode() + b"\n")
        return started

    async def run(self, events: RankEvents) -> None:
        """Passes on what the rank says and does, until it has ended."""
        async with asyncio.TaskGroup() as tasks:
            readers = [
                tasks.create_task(self._follow_output(events)), tasks.create_task(self._follow_statuses(events)),
                tasks.create_task(self._follow_operations(events)),
            ]
            code = await self.process.wait()
            await asyncio.wait(readers, timeout=_LAST_WORDS_S)
            for reader in readers:
                reader.cancel()
        events.on_exit(self.launch.rank, code)

    async def _follow_output(self, events: RankEvents) -> None:
        assert self.process.stdout is not None
        async for raw in _lines(self.process.stdout):
            line = raw.decode("utf-8", "replace").rstrip()
            print(line, file=sys.stderr, flush=True)
            events.on_output(self.launch.rank, line)

    async def _follow_statuses(self, events: RankEvents) -> None:
        async for line in _lines(self._status):
            events.on_status(self.launch.rank, RankStatus.from_json(line.decode()))

    async def _follow_operations(self, events: RankEvents) -> None:
        async for line in _lines(self._store):
            events.on_operation(self.launch.rank, line, self._write)

    def _write(self, line: bytes) -> None:
        """A line for the rank: its orders, or an answer of the store. One that has ended meanwhile needs none: its exit says why."""
        assert self.process.stdin is not None
        if not self.process.stdin.is_closing():
            self.process.stdin.write(line)

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
        for transport in self._transports:
            transport.close()
        if self.process.stdin is not None:
            self.process.stdin.close()


async def _reader_of(descriptor: int) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
    reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", 0)
    )
    return reader, transport


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Every line until the end; an overlong one is cut instead of ending the reading."""
    while True:
        try:
            line = await stream.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            line = error.partial
        except asyncio.LimitOverrunError as error:
            line = await stream.read(error.consumed) or b"\n"
        if not line:
            return
        yield line

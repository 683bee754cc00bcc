"""A real rank process, started and watched as a node does it."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tensorway.deadline import Deadline
from tensorway.model_directory import load_directory
from tensorway.transport import create_link_client
from tensorway.transport.port import LinkClient, Payload
from tensorway_worker.meeting import Meeting
from tensorway_worker.rank.launch import STATUS_FD_VARIABLE, STORE_FD_VARIABLE, RankLaunch, RankStatus

START_S = 60.0


@dataclass
class RunningRank:
    """One rank process and its two pipes."""

    launch: RankLaunch
    process: subprocess.Popen[bytes]
    statuses: asyncio.StreamReader
    log: Path

    async def status(self) -> RankStatus | None:
        """The next status; None once the rank has closed its pipe."""
        line = await asyncio.wait_for(self.statuses.readline(), START_S)
        return RankStatus.from_json(line.decode()) if line else None

    async def wait_for(self, is_wanted: Callable[[RankStatus], bool]) -> RankStatus:
        """The first status that `is_wanted`."""
        while (status := await self.status()) is not None:
            if is_wanted(status):
                return status
        raise AssertionError(f"the rank ended:\n{self.log.read_text()}")

    async def ready(self) -> RankStatus:
        return await self.wait_for(lambda status: status.state in ("ready", "failed"))

    async def exit_status(self) -> int:
        """Waits for the process to end."""
        return await asyncio.wait_for(asyncio.to_thread(self.process.wait), START_S)


def launch_of(model: Path, folder: Path, **changes: object) -> RankLaunch:
    """Orders for a group of one rank that lives in `folder`."""
    directory = load_directory(model)
    launch = RankLaunch(
        model_path=str(model),
        model=directory.yaml.name,
        revision=directory.spec.revision,
        group=f"{directory.yaml.name}-0",
        epoch=1,
        rank=0,
        world_size=1,
        pipeline=1,
        tensor=1,
        node="node-1",
        registry=f"directory:{folder / 'registry'}",
        listen="127.0.0.1:0",
        advertise_host="",
        threads=1,
        device="cpu",
        transport="completion-queue",
        max_message_bytes=64 * 1024 * 1024,
        heartbeat_s=0.05,
        grace_s=10.0,
        log_level="info",
        log_format="json",
        secret="5" * 64,
    )
    return replace(launch, **changes)  # type: ignore[arg-type]


def new_meeting() -> Meeting:
    """Where the ranks of one epoch meet."""
    return Meeting(asyncio.get_running_loop().call_later)


@asynccontextmanager
async def running(launch: RankLaunch, meeting: Meeting | None = None) -> AsyncIterator[RunningRank]:
    """Starts a rank; kills what is left of it. Ranks of one group share a meeting."""
    folder = Path(tempfile.mkdtemp(prefix="tensorway-rank-"))
    log = folder / f"rank-{launch.rank}.log"
    read_end, write_end = os.pipe()
    store_end, store_write_end = os.pipe()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tensorway_worker.rank"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(write_end, store_write_end),
            env={
                **os.environ, STATUS_FD_VARIABLE: str(write_end), STORE_FD_VARIABLE: str(store_write_end),
                "RANK": str(launch.rank), "WORLD_SIZE": str(launch.world_size),
            },
        )
    os.close(write_end)
    os.close(store_write_end)
    assert process.stdin is not None
    process.stdin.write(launch.to_json().encode() + b"\n")
    process.stdin.flush()
    statuses = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(statuses), os.fdopen(read_end, "rb")
    )
    keep_store(store_end, process, meeting or new_meeting())
    try:
        yield RunningRank(launch, process, statuses, log)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        transport.close()
        asyncio.get_running_loop().remove_reader(store_end)
        os.close(store_end)
        shutil.rmtree(folder)


def keep_store(descriptor: int, process: subprocess.Popen[bytes], meeting: Meeting) -> None:
    """Answers the rank's operations on the store, as its node does."""
    loop = asyncio.get_running_loop()
    rest = bytearray()

    def answer(line: bytes) -> None:
        if process.poll() is None and process.stdin is not None:
            os.write(process.stdin.fileno(), line)

    def readable() -> None:
        read = os.read(descriptor, 65_536)
        if not read:
            loop.remove_reader(descriptor)
        rest.extend(read)
        while b"\n" in rest:
            line, _, after = rest.partition(b"\n")
            rest[:] = after
            meeting.take(bytes(line), answer)

    loop.add_reader(descriptor, readable)


@asynccontextmanager
async def linked(endpoint: str) -> AsyncIterator[LinkClient]:
    """A connected link to a rank."""
    client = create_link_client(endpoint)
    async with asyncio.TaskGroup() as tasks:
        running_link = tasks.create_task(client.run())
        await client.wait_connected(Deadline.after(START_S))
        yield client
        running_link.cancel()


async def call(client: LinkClient, batch: tuple[bytes, Payload]) -> tuple[bytes, Payload]:
    reply = await client.call(batch[0], batch[1], Deadline.after(START_S))
    return reply.head, reply.payload

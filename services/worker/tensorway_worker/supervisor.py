"""One group under supervision: formed, watched, ended as a whole, and formed anew with the next epoch.

A group is never repaired in place: when any rank dies, hangs or fails to start, all its ranks are killed and a new epoch begins, after a
back-off that grows while epochs fail before they serve.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from tensorway.model_directory import ModelDirectory
from tensorway_worker.placement import Replica
from tensorway_worker.rank import launch as words
from tensorway_worker.rank.launch import RankLaunch, RankStatus
from tensorway_worker.rank_process import RankProcess
from tensorway_worker.settings import NodeSettings
from tensorway_worker.topology import Topology, threads_per_rank

_LOG = logging.getLogger(__name__)
_FIRST_BACK_OFF_S: Final = 0.2
_MAX_BACK_OFF_S: Final = 30.0
BACKING_OFF: Final = "backing_off"


class RankFailure(Exception):
    """An epoch has ended; the text says why."""


@dataclass(slots=True)
class GroupReport:
    """What the node says of one group."""

    id: str
    replica: Replica
    epoch: int = 0
    state: str = words.STARTING
    detail: str = ""
    fraction: float = -1.0
    reason: str = ""
    endpoint: str = ""
    pids: tuple[int, ...] = ()
    num_steps: int = 0


@dataclass(slots=True, eq=False)
class GroupSupervisor:
    """Owns the rank processes of one replica. `run` until cancelled; leaving it leaves no process behind."""

    replica: Replica
    directory: ModelDirectory
    settings: NodeSettings
    node: str
    devices: tuple[str, ...]
    on_change: Callable[[], None]
    report: GroupReport = field(init=False)
    _back_off_s: float = 0.0
    _ranks: list[RankProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.report = GroupReport(f"{self.replica.model}.{self.replica.index}@{self.node}", self.replica)

    async def run(self) -> None:
        """Forms the group again and again. Cancelling drains it within the grace period."""
        while True:
            self.report.epoch += 1
            was_ready = await self._live_one_epoch()
            self._back_off_s = 0.0 if was_ready else min(_MAX_BACK_OFF_S, max(_FIRST_BACK_OFF_S, self._back_off_s * 2))
            if self._back_off_s:
                self._show(BACKING_OFF, detail=f"next try in {self._back_off_s:.1f} s")
                await asyncio.sleep(self._back_off_s)

    async def _live_one_epoch(self) -> bool:
        """One epoch from start to end; says whether it ever served."""
        started_s = time.monotonic()
        rendezvous = tempfile.mkdtemp(prefix="tensorway-rendezvous-")
        grace_s = 0.0
        was_ready = False
        try:
            self._show(words.STARTING, endpoint="")
            await self._start_ranks(rendezvous)
            await self._watch_ranks()
        except RankFailure as failure:
            was_ready = self.report.state == words.READY
            self.report.reason = f"epoch {self.report.epoch}: {failure}"
            _LOG.error("group ended after %.1f s: %s", time.monotonic() - started_s, failure, extra={"fields": self._fields()})
        except asyncio.CancelledError:
            grace_s = self.settings.grace_s
            self._show(words.STOPPING)
            raise
        finally:
            await asyncio.shield(self._end_ranks(grace_s))
            shutil.rmtree(rendezvous, ignore_errors=True)
        return was_ready

    async def _start_ranks(self, rendezvous: str) -> None:
        parallel = self.directory.yaml.parallel
        topology = Topology(parallel.pipeline, parallel.tensor)
        for rank in range(topology.world_size):
            launch = self._launch(rank, topology, rendezvous)
            try:
                self._ranks.append(await RankProcess.start(launch, _environment(launch, self.devices[rank])))
            except OSError as error:
                raise RankFailure(f"rank {rank} cannot be started: {error}") from error
        self.report.pids = tuple(rank.process.pid for rank in self._ranks)

    async def _watch_ranks(self) -> None:
        """Raises RankFailure when the first rank ends, hangs or fails."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for rank in self._ranks:
                    tasks.create_task(rank.follow_output())
                    tasks.create_task(self._watch_exit(rank))
                tasks.create_task(self._watch_leader(self._ranks[0]))
        except ExceptionGroup as group:
            failures, others = group.split(RankFailure)
            if failures is None or others is not None:
                raise
            raise failures.exceptions[0] from None

    async def _watch_exit(self, rank: RankProcess) -> None:
        await rank.process.wait()
        # Its last words may still be in the pipe.
        await asyncio.sleep(0.02)
        raise RankFailure(rank.end_reason())

    async def _watch_leader(self, leader: RankProcess) -> None:
        """Follows the leader's statuses: first within the start-up timeout, then heartbeat by heartbeat."""
        startup_s = self.directory.yaml.startup_timeout_s
        try:
            async with asyncio.timeout(startup_s) as window:
                async for status in leader.statuses():
                    self._take_status(status)
                    if status.state == words.READY:
                        window.reschedule(asyncio.get_running_loop().time() + self.settings.hung_after_s)
        except TimeoutError:
            if self.report.state == words.READY:
                raise RankFailure(f"rank 0 has been silent for {self.settings.hung_after_s:.1f} s and counts as hung") from None
            said = " | ".join(list(leader.last_lines)[-5:])
            raise RankFailure(
                f"not ready within startup_timeout_s={startup_s:.0f} (state {self.report.state}: {self.report.detail})"
                + (f"; its last lines: {said}" if said else "")
            ) from None

    def _take_status(self, status: RankStatus) -> None:
        report = self.report
        if status.step_running_s > self.settings.max_step_s:
            raise RankFailure(f"a step has run for {status.step_running_s:.0f} s, longer than max_step_s={self.settings.max_step_s:.0f}")
        report.num_steps = status.num_steps
        if status.state == words.FAILED:
            raise RankFailure(status.detail)
        if (status.state, status.detail, status.endpoint) != (report.state, report.detail, report.endpoint):
            if status.state == words.READY and report.state != words.READY:
                report.reason = ""
                _LOG.info("group ready", extra={"fields": {**self._fields(), "endpoint": status.endpoint}})
            report.fraction = status.fraction
            self._show(status.state, status.detail, status.endpoint)

    async def _end_ranks(self, grace_s: float) -> None:
        ranks, self._ranks = self._ranks, []
        await asyncio.gather(*(rank.stop(grace_s) for rank in ranks))
        self.report.pids = ()

    def _launch(self, rank: int, topology: Topology, rendezvous: str) -> RankLaunch:
        settings, model = self.settings, self.directory.yaml
        device = self.devices[rank]
        return RankLaunch(
            model_path=str(self.directory.path), model=model.name, revision=self.replica.revision, group=self.report.id,
            epoch=self.report.epoch, rank=rank, world_size=topology.world_size,
            pipeline=topology.pipeline, tensor=topology.tensor,
            node=self.node, registry=settings.registry, listen=settings.rank_listen, advertise_host=settings.advertise_host,
            rendezvous_dir=rendezvous,
            threads=threads_per_rank(os.cpu_count() or 1, topology.world_size, model.threads or settings.threads),
            # A rank sees its one device only, by CUDA_VISIBLE_DEVICES.
            device="cpu" if device == "cpu" else "cuda:0", transport=settings.transport, max_message_bytes=settings.max_message_bytes,
            heartbeat_s=settings.heartbeat_s, grace_s=settings.grace_s, log_level=settings.log_level, log_format=settings.log_format,
            local_links=settings.local_links,
        )

    def _show(self, state: str, detail: str = "", endpoint: str | None = None) -> None:
        self.report.state, self.report.detail = state, detail
        if endpoint is not None:
            self.report.endpoint = endpoint
        self.on_change()

    def _fields(self) -> dict[str, object]:
        return {"group": self.report.id, "model": self.replica.model, "epoch": self.report.epoch}


def _environment(launch: RankLaunch, device: str) -> dict[str, str]:
    """torchrun's variables, and the one device that the rank may see."""
    environment = {
        "RANK": str(launch.rank), "LOCAL_RANK": str(launch.rank), "WORLD_SIZE": str(launch.world_size),
        "LOCAL_WORLD_SIZE": str(launch.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
        "OMP_NUM_THREADS": str(launch.threads), "PYTHONUNBUFFERED": "1",
    }
    if device.startswith("cuda:"):
        environment["CUDA_VISIBLE_DEVICES"] = device.removeprefix("cuda:")
    return environment

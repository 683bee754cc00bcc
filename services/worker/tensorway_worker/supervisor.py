"""One group under supervision: formed, watched, ended as a whole, and formed anew with the next epoch.

A group is never repaired in place: when any rank dies, hangs or fails to start, all its ranks are killed and a new epoch begins, after a
back-off that grows while epochs fail before they serve.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from tensorway.errors import TensorwayError, Unavailable
from tensorway.model_directory import ModelDirectory
from tensorway.registry.port import NODE
from tensorway_worker.devices import DevicePool
from tensorway_worker.epoch import Bounds, Epoch, RankFailure
from tensorway_worker.group_report import GroupReport
from tensorway_worker.guest_block import GuestBlock
from tensorway_worker.hosted_rank import Block
from tensorway_worker.local_block import LocalBlock
from tensorway_worker.orders import BlockOrders, launches
from tensorway_worker.placement import Partner, Replica
from tensorway_worker.rank import launch as words
from tensorway_worker.settings import NodeSettings

_LOG = logging.getLogger(__name__)
_FIRST_BACK_OFF_S: Final = 0.2
_MAX_BACK_OFF_S: Final = 30.0
_SECRET_BYTES: Final = 32
BACKING_OFF: Final = "backing_off"


@dataclass(slots=True, eq=False)
class GroupSupervisor:
    """Owns the ranks of one replica, here and on other nodes. `run` until cancelled; leaving it leaves no process behind."""

    replica: Replica
    directory: ModelDirectory
    settings: NodeSettings
    node: str
    devices: DevicePool
    on_change: Callable[[], None]
    #: The nodes that may host the other blocks of a group over several nodes, best first; read anew for each epoch.
    partners: Callable[[Replica], tuple[Partner, ...]] = lambda _: ()
    report: GroupReport = field(init=False)
    _back_off_s: float = 0.0
    _again: asyncio.Event = field(default_factory=asyncio.Event)
    _epoch: Epoch | None = None
    #: Whether this epoch, and whether any epoch, has served.
    _is_served: bool = False
    _was_served: bool = False

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
                await self._back_off()

    def try_again(self) -> None:
        """What the group lacked may be there now: a back-off that is under way ends."""
        self._again.set()

    async def _back_off(self) -> None:
        self._again.clear()
        try:
            async with asyncio.timeout(self._back_off_s):
                await self._again.wait()
        except TimeoutError:
            return

    async def _live_one_epoch(self) -> bool:
        """One epoch from start to end; says whether it ever served."""
        started_s = time.monotonic()
        grace_s = 0.0
        acquired: tuple[tuple[str, ...], ...] = ()
        self._epoch, self._is_served = None, False
        self.report.endpoint = ""
        self._show(words.STARTING)
        try:
            parallel = self.directory.yaml.parallel
            acquired = self.devices.acquire(self.directory.yaml, parallel.world_size // parallel.nodes)
            self._epoch = Epoch(self._blocks(acquired), self._bounds(), self.report.id, self._on_status)
            await self._epoch.run()
        except (RankFailure, TensorwayError) as failure:
            self.report.reason = f"epoch {self.report.epoch}: {failure}"
            _LOG.error("group ended after %.1f s: %s", time.monotonic() - started_s, failure, extra={"fields": self._fields()})
            # Ending the ranks may take a moment; why they end need not wait for it.
            self._show(words.STOPPING)
        except asyncio.CancelledError:
            grace_s = self.settings.grace_s
            self._show(words.STOPPING)
            raise
        finally:
            if self._epoch is not None:
                await asyncio.shield(self._epoch.end(grace_s))
            self.devices.release(acquired)
            self.report.forget_ranks()
        return self._is_served

    def _blocks(self, acquired: tuple[tuple[str, ...], ...]) -> tuple[Block, ...]:
        """The group's ranks in equal blocks, the first of them here. Raises Unavailable where other nodes are needed and missing."""
        parallel, settings = self.directory.yaml.parallel, self.settings
        partners = self._chosen_partners(parallel.nodes - 1)
        secret = secrets.token_hex(_SECRET_BYTES)
        size = parallel.world_size // parallel.nodes
        is_cut = parallel.world_size > 1
        orders = [
            BlockOrders(
                model=self.replica.model, revision=self.replica.revision, group=self.report.id, epoch=self.report.epoch, owner=self.node,
                first_rank=first_rank, num_ranks=size, pipeline=parallel.pipeline, tensor=parallel.tensor,
                is_spread=bool(partners), secret=secret,
                verify=is_cut and (parallel.verify == "always" or (parallel.verify == "auto" and not self._was_served)),
                heartbeat_s=settings.heartbeat_s, hung_after_s=settings.hung_after_s, grace_s=settings.grace_s,
            )
            for first_rank in range(0, parallel.world_size, size)
        ]
        own = LocalBlock(self.node, launches(orders[0], self.directory, settings, self.node, acquired), acquired)
        tls = None if settings.mesh_tls is None else settings.mesh_tls.dial(NODE)
        guests = (GuestBlock(partner, order, tls) for partner, order in zip(partners, orders[1:], strict=True))
        return (own, *guests)

    def _chosen_partners(self, number: int) -> tuple[Partner, ...]:
        if not number:
            return ()
        found = self.partners(self.replica)
        if len(found) < number:
            raise Unavailable(
                f"no free partner: the group wants {number} more node{'s' if number > 1 else ''}, and {len(found)} other live "
                f"node{' offers' if len(found) == 1 else 's offer'} revision {self.replica.revision[:12]}; start one with the same model "
                "directory and rank_interface set", field="parallel.nodes",
            )
        return found[:number]

    def _bounds(self) -> Bounds:
        return Bounds(self.directory.yaml.startup_timeout_s, self.settings.hung_after_s, self.settings.max_step_s)

    def _on_status(self, has_changed: bool) -> None:
        epoch, report = self._epoch, self.report
        if epoch is None:
            return
        report.ranks, report.num_steps, report.fraction = epoch.ranks, epoch.leader.num_steps, epoch.fraction
        if not has_changed:
            return
        state = epoch.state
        if state == words.READY and not self._is_served:
            self._is_served = self._was_served = True
            report.reason = ""
            _LOG.info("group ready", extra={"fields": {**self._fields(), "endpoint": epoch.leader.endpoint}})
        if state != words.FAILED:
            report.state = state
        report.detail, report.endpoint = epoch.detail, epoch.leader.endpoint
        self.on_change()

    def _show(self, state: str, detail: str = "") -> None:
        self.report.state, self.report.detail = state, detail
        self.on_change()

    def _fields(self) -> dict[str, object]:
        return {"group": self.report.id, "model": self.replica.model, "epoch": self.report.epoch}

"""Ranks that this node hosts for groups of other nodes: `NodeService.RunRanks`.

The owner's stream is the ranks' life: when it ends or falls silent, they are killed at once, so that no rank ever outlives its group.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from tensorway.errors import FailedPrecondition, InvalidRequest, NotFound, TensorwayError, Unavailable
from tensorway.model_directory import ModelDirectory
from tensorway.transport.port import Server, Stream
from tensorway.v1 import node_pb2
from tensorway_worker.devices import DevicePool
from tensorway_worker.guest_wire import RUN_RANKS, read_orders, read_request
from tensorway_worker.hosted_rank import BlockLost, StartedRank
from tensorway_worker.local_block import LocalBlock
from tensorway_worker.meeting import Answer
from tensorway_worker.orders import BlockOrders, launches
from tensorway_worker.rank.launch import RankStatus
from tensorway_worker.settings import NodeSettings

_LOG = logging.getLogger(__name__)


class GuestHost:
    """Answers RunRanks. Runs only revisions that this node offers itself, from its own directories."""

    def __init__(self, node: str, directories: Mapping[str, ModelDirectory], settings: NodeSettings, devices: DevicePool) -> None:
        self._node = node
        self._directories = directories
        self._settings = settings
        self._devices = devices
        self._draining = asyncio.Event()
        self._num_visits = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def attach(self, server: Server) -> None:
        server.add_stream(RUN_RANKS, self.run_ranks)

    async def drain(self) -> None:
        """Ends all hosted ranks: their groups form anew elsewhere. Returns when they have been reaped."""
        self._draining.set()
        await self._empty.wait()

    async def run_ranks(self, stream: Stream) -> None:
        """One block of ranks, for as long as its stream lasts."""
        orders = read_orders(await stream.read())
        directory = self._admit(orders)
        self._num_visits += 1
        self._empty.clear()
        fields = {"group": orders.group, "epoch": orders.epoch, "owner": orders.owner, "ranks": list(orders.ranks)}
        _LOG.info("ranks hosted", extra={"fields": fields})
        acquired: tuple[tuple[str, ...], ...] = ()
        try:
            acquired = self._devices.acquire(directory.yaml, orders.num_ranks)
            block = LocalBlock(self._node, launches(orders, directory, self._settings, self._node, acquired), acquired)
            await _Visit(stream, orders, block, self._draining).run()
        finally:
            self._devices.release(acquired)
            self._num_visits -= 1
            if not self._num_visits:
                self._empty.set()
            _LOG.info("hosted ranks ended", extra={"fields": fields})

    def _admit(self, orders: BlockOrders) -> ModelDirectory:
        if not self._settings.rank_interface:
            raise FailedPrecondition(
                f"node {self._node} hosts no ranks of other nodes; set rank_interface to a network interface that is private to the mesh",
                field="rank_interface",
            )
        if self._draining.is_set():
            raise Unavailable(f"node {self._node} is draining")
        directory = self._directories.get(orders.revision)
        if directory is None or directory.yaml.name != orders.model:
            raise NotFound(
                f"node {self._node} does not offer revision {orders.revision[:12]} of model {orders.model[:128]!r}", field="revision"
            )
        parallel = directory.yaml.parallel
        is_cut_so = (parallel.pipeline, parallel.tensor) == (orders.pipeline, orders.tensor)
        if not is_cut_so or orders.num_ranks * parallel.nodes != parallel.world_size:
            raise InvalidRequest(
                f"orders: the revision is cut {parallel.pipeline} x {parallel.tensor} over {parallel.nodes} nodes", field="orders"
            )
        return directory


@dataclass(slots=True, eq=False)
class _Visit:
    """Implements `RankEvents`: one block, and the stream to its owner."""

    stream: Stream
    orders: BlockOrders
    block: LocalBlock
    draining: asyncio.Event
    _outbox: asyncio.Queue[node_pb2.RunRanksResponse] = field(default_factory=asyncio.Queue)
    _answers: dict[int, Answer] = field(default_factory=dict)
    _grace_s: float = 0.0

    async def run(self) -> None:
        """Until the ranks have ended, the owner ends them, or the owner is lost. Leaves no process behind."""
        try:
            try:
                started = await self.block.start()
            except BlockLost as lost:
                raise Unavailable(str(lost)) from lost
            self._outbox.put_nowait(node_pb2.RunRanksResponse(started=_started_message(started)))
            async with asyncio.TaskGroup() as tasks:
                writing = tasks.create_task(self._write())
                ending = (tasks.create_task(self._read()), tasks.create_task(self.draining.wait()), tasks.create_task(self.block.run(self)))
                await asyncio.wait(ending, return_when=asyncio.FIRST_COMPLETED)
                if ending[2].done():
                    # The owner reads how they ended, and ends the stream.
                    await asyncio.wait(ending[:2], return_when=asyncio.FIRST_COMPLETED)
                for task in (writing, *ending):
                    task.cancel()
        except ExceptionGroup as group:
            raise _first_error(group) from None
        finally:
            await asyncio.shield(self.block.stop(self._grace_s))
        if self.draining.is_set():
            raise Unavailable("it is draining")

    async def _read(self) -> None:
        """What the owner says, until it ends the ranks. Raises Unavailable where it is lost."""
        while True:
            try:
                async with asyncio.timeout(self.orders.hung_after_s):
                    message = await self.stream.read()
            except TimeoutError:
                raise Unavailable(f"the owner has been silent for {self.orders.hung_after_s:.1f} s and counts as lost") from None
            if message is None:
                return
            request = read_request(message)
            kind = request.WhichOneof("message")
            if kind == "stop":
                self._grace_s = request.stop.grace_s
                return
            if kind == "answer":
                answer = self._answers.get(request.answer.rank)
                if answer is None:
                    raise InvalidRequest(f"answer.rank: rank {request.answer.rank} has asked nothing", field="answer.rank")
                answer(request.answer.line)

    async def _write(self) -> None:
        while True:
            await self.stream.write((await self._outbox.get()).SerializeToString())

    def on_status(self, rank: int, status: RankStatus) -> None:
        line = status.to_json().encode()
        self._outbox.put_nowait(node_pb2.RunRanksResponse(status=node_pb2.RankLine(rank=rank, line=line)))

    def on_output(self, rank: int, line: str) -> None:
        self._outbox.put_nowait(node_pb2.RunRanksResponse(output=node_pb2.RankLine(rank=rank, line=line.encode())))

    def on_operation(self, rank: int, line: bytes, answer: Answer) -> None:
        self._answers[rank] = answer
        self._outbox.put_nowait(node_pb2.RunRanksResponse(operation=node_pb2.RankLine(rank=rank, line=line)))

    def on_exit(self, rank: int, code: int) -> None:
        self._outbox.put_nowait(node_pb2.RunRanksResponse(exit=node_pb2.RankExit(rank=rank, code=code)))


def _started_message(started: tuple[StartedRank, ...]) -> node_pb2.StartedRanks:
    return node_pb2.StartedRanks(ranks=[node_pb2.StartedRank(rank=one.rank, pid=one.pid, device=one.device) for one in started])


def _first_error(group: ExceptionGroup[Exception]) -> Exception:
    """The error of ours that ended a visit, else the first of all."""
    ours = group.subgroup(TensorwayError)
    found: Exception | ExceptionGroup[Exception] = ours or group
    while isinstance(found, ExceptionGroup):
        found = found.exceptions[0]
    return found

"""A block of ranks that another node hosts, as the node that owns the group sees it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Final

from tensorway.errors import TensorwayError, Unavailable
from tensorway.tls import ChannelTls
from tensorway.transport import AsyncChannel, ClientStream
from tensorway.v1 import node_pb2
from tensorway_worker.guest_wire import RUN_RANKS, orders_message
from tensorway_worker.hosted_rank import BlockLost, RankEvents, StartedRank
from tensorway_worker.meeting import Answer
from tensorway_worker.orders import BlockOrders
from tensorway_worker.placement import Partner
from tensorway_worker.rank.launch import RankStatus

_LOG = logging.getLogger(__name__)
#: A host that has not answered the orders by then is given up.
_START_TIMEOUT_S: Final = 15.0
#: What a host gets to reap its ranks, beyond their grace, before it is given up.
_REAP_TIMEOUT_S: Final = 2.0


@dataclass(slots=True, eq=False)
class GuestBlock:
    """Implements `Block` with ranks of another node, over one stream. The stream's end, on either side, is the ranks' end."""

    partner: Partner
    orders: BlockOrders
    tls: ChannelTls | None = None
    _channel: AsyncChannel | None = None
    _stream: ClientStream | None = None
    #: Messages to the host, in order. Unbounded, but the store's answers are bounded by what its ranks ask.
    _outbox: asyncio.Queue[node_pb2.RunRanksRequest] = field(default_factory=asyncio.Queue)

    @property
    def node(self) -> str:
        return self.partner.node

    @property
    def ranks(self) -> range:
        return self.orders.ranks

    async def start(self) -> tuple[StartedRank, ...]:
        self._channel = AsyncChannel(self.partner.endpoint, tls=self.tls)
        self._stream = self._channel.stream(RUN_RANKS)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                try:
                    await self._stream.write(orders_message(self.orders).SerializeToString())
                except Unavailable:
                    _LOG.debug("the orders were not taken; reading says why")
                response = await self._read()
        except TimeoutError:
            raise self._lost(f"it has not answered in {_START_TIMEOUT_S:.0f} s") from None
        return tuple(StartedRank(rank.rank, rank.pid, rank.device) for rank in response.started.ranks)

    async def run(self, events: RankEvents) -> None:
        running = set(self.ranks)
        try:
            async with asyncio.TaskGroup() as tasks:
                writing = [tasks.create_task(self._write()), tasks.create_task(self._beat())]
                while running:
                    running -= self._pass_on(await self._read(), events)
                for task in writing:
                    task.cancel()
        except ExceptionGroup as group:
            lost, others = group.split(BlockLost)
            if lost is None or others is not None:
                raise
            raise lost.exceptions[0] from None

    async def stop(self, grace_s: float) -> None:
        stream, channel = self._stream, self._channel
        self._stream = self._channel = None
        if stream is None or channel is None:
            return
        try:
            async with asyncio.timeout(grace_s + _REAP_TIMEOUT_S):
                message = node_pb2.RunRanksRequest(stop=node_pb2.StopRanks(grace_s=grace_s))
                await stream.write(message.SerializeToString())
                while await stream.read() is not None:
                    continue  # what the ranks say while they end matters no more
        except TimeoutError:
            _LOG.warning("node %s has not ended its ranks of group %s in time and is given up", self.node, self.orders.group)
        except TensorwayError as error:
            _LOG.debug("the stream of group %s to node %s has ended: %s", self.orders.group, self.node, error)
        finally:
            await stream.cancel()
            await channel.close()

    async def _read(self) -> node_pb2.RunRanksResponse:
        """The host's next message. Raises BlockLost where there is none."""
        assert self._stream is not None
        try:
            message = await self._stream.read()
        except TensorwayError as error:
            raise self._lost(str(error)) from error
        if message is None:
            raise self._lost("it has given them up")
        return node_pb2.RunRanksResponse.FromString(message)

    async def _write(self) -> None:
        assert self._stream is not None
        try:
            while True:
                await self._stream.write((await self._outbox.get()).SerializeToString())
        except Unavailable:
            return  # reading says why

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.orders.heartbeat_s)
            if self._outbox.empty():
                self._outbox.put_nowait(node_pb2.RunRanksRequest(beat=node_pb2.OwnerBeat()))

    def _pass_on(self, response: node_pb2.RunRanksResponse, events: RankEvents) -> set[int]:
        """Tells what has come; returns the ranks that have ended by it."""
        kind = response.WhichOneof("message")
        if kind == "status":
            events.on_status(response.status.rank, RankStatus.from_json(response.status.line.decode()))
        elif kind == "output":
            events.on_output(response.output.rank, response.output.line.decode("utf-8", "replace"))
        elif kind == "operation":
            events.on_operation(response.operation.rank, response.operation.line, self._answer_to(response.operation.rank))
        elif kind == "exit":
            events.on_exit(response.exit.rank, response.exit.code)
            return {response.exit.rank}
        return set()

    def _answer_to(self, rank: int) -> Answer:
        def answer(line: bytes) -> None:
            self._outbox.put_nowait(node_pb2.RunRanksRequest(answer=node_pb2.StoreAnswer(rank=rank, line=line)))

        return answer

    def _lost(self, why: str) -> BlockLost:
        ranks = f"rank {self.ranks[0]}" if len(self.ranks) == 1 else f"ranks {self.ranks[0]} to {self.ranks[-1]}"
        return BlockLost(f"node {self.node}, which was to host {ranks}, is lost: {why}")

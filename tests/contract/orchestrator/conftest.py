"""A real orchestrator core in this process, between real links: scripted leaders below, a link as the gateway's above."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from tensorway.deadline import Deadline
from tensorway.errors import TensorwayError
from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import DESIRED, GROUP, Lease, Registration
from tensorway.revisions import encode_revision, revision_key
from tensorway.signature import Batching, RevisionSpec, Signature, TensorSpec
from tensorway.tensors import DataType
from tensorway.transport import LinkServer, create_link_client, create_server
from tensorway.transport.port import Exchange, LinkClient, Server, ServerOptions
from tensorway.v1 import link_pb2
from tensorway_orchestrator.dispatcher import Dispatcher
from tensorway_orchestrator.metrics import OrchestratorMetrics
from tensorway_orchestrator.pool import GroupPool
from tensorway_orchestrator.servicer import InferenceServicer
from tensorway_orchestrator.settings import OrchestratorSettings

REVISION = "ab" * 32
ECHO = RevisionSpec(
    model="echo", revision=REVISION, version="1", description="", engine="python",
    signature=Signature((TensorSpec("input", DataType.UINT8, ("rows", "any")),), (TensorSpec("output", DataType.UINT8, ("rows", "any")),)),
    batching=Batching(max_rows=8, max_queue_rows=200), num_replicas=1, default_timeout_s=60.0,
)


@dataclass(eq=False)
class Batch:
    """One batch as a scripted leader received it."""

    exchange: Exchange
    head: link_pb2.BatchHead
    requests: list[link_pb2.RequestHead]

    @property
    def ids(self) -> list[str]:
        return [request.request_id for request in self.requests]

    def echo(self, *, failing: dict[str, TensorwayError] | None = None, step_us: int = 1000) -> None:
        """Answers each request with its own input bytes, or with its error in `failing`."""
        content = b"".join(map(bytes, self.exchange.payload))
        reply, kept, offset = link_pb2.BatchReplyHead(step_us=step_us), [], 0
        for request in self.requests:
            size = sum(tensor.num_bytes for tensor in request.inputs)
            error = (failing or {}).get(request.request_id)
            if error is not None:
                detail = link_pb2.ErrorDetail(reason=error.reason, status=error.status, message=error.message)
                reply.results.add(error=detail)
            else:
                output = link_pb2.TensorHead(name="output", dtype=2, shape=request.inputs[0].shape, num_bytes=size)
                head = link_pb2.ResponseHead(outputs=[output])
                reply.results.add(response=head.SerializeToString(), body_bytes=size)
                kept.append(content[offset : offset + size])
            offset += size
        self.exchange.reply(reply.SerializeToString(), (b"".join(kept),))


@dataclass(eq=False)
class Leader:
    """A scripted leader behind a real link server; `batches` are what it was sent."""

    server: Server
    links: LinkServer
    lease: Lease | None = None
    batches: list[Batch] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    on_batch: Callable[[Batch], None] = lambda batch: batch.echo()
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, exchange: Exchange) -> None:
        head = link_pb2.BatchHead.FromString(exchange.head)
        batch = Batch(exchange, head, [link_pb2.RequestHead.FromString(request) for request in head.requests])
        exchange.on_cancel(lambda: self.cancelled.append(head.batch_id))
        self.batches.append(batch)
        self._arrived.set()
        self.on_batch(batch)

    async def wait_batches(self, count: int) -> None:
        while len(self.batches) < count:
            self._arrived.clear()
            await self._arrived.wait()


@dataclass(eq=False)
class Bench:
    """The orchestrator under test and the means to drive it."""

    registry: DirectoryRegistry
    dispatcher: Dispatcher
    pool: GroupPool
    link: LinkClient
    endpoint: str
    stack: AsyncExitStack
    metrics_registry: CollectorRegistry

    async def add_leader(
        self, name: str, epoch: int = 1, on_batch: Callable[[Batch], None] | None = None, spec: RevisionSpec = ECHO
    ) -> Leader:
        """A leader that is registered and connected."""
        server = create_server(ServerOptions("127.0.0.1:0"))
        leader = Leader(server, None)  # type: ignore[arg-type]
        leader.links = LinkServer(leader.take)
        if on_batch is not None:
            leader.on_batch = on_batch
        leader.links.attach(server)
        endpoint = await server.start()
        self.stack.push_async_callback(server.stop, 0.0)
        metadata = {"model": spec.model, "revision": spec.revision, "epoch": str(epoch), "node": "n", "max_rows": "8"}
        leader.lease = await self.registry.register(Registration(GROUP, name, endpoint, metadata))
        async with asyncio.timeout(10):
            lane = self.dispatcher.lane(spec.model, spec.revision)
            while f"{name}#{epoch}" not in lane.groups or not lane.groups[f"{name}#{epoch}"].lives:
                await asyncio.sleep(0.005)
        return leader

    def count(self, name: str, model: str = "echo") -> float:
        """A counter of the orchestrator."""
        return self.metrics_registry.get_sample_value(f"tensorway_orchestrator_{name}_total", {"model": model}) or 0.0

    async def infer(
        self, name: str, content: bytes = b"abc", *, rows: int = 1, timeout_s: float = 10.0, priority: int = 0, model: str = "echo",
        key: str = "",
    ) -> bytes:
        """One request over the link; returns the output's bytes."""
        head = link_pb2.RequestHead(request_id=name, model=model, rows=rows, priority=priority, idempotency_key=key)
        head.inputs.add(name="input", dtype=2, shape=[rows, len(content) // max(1, rows)], num_bytes=len(content))
        reply = await self.link.call(head.SerializeToString(), (content,), Deadline.after(timeout_s))
        self.last_reply = link_pb2.ReplyHead.FromString(reply.head)
        return b"".join(map(bytes, reply.payload))


@asynccontextmanager
async def orchestrator_bench(tmp_path: Path, *specs: RevisionSpec, **settings: object) -> AsyncIterator[Bench]:
    """Knows `specs`, or `ECHO` where none is given."""
    specs = specs or (ECHO,)
    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(DirectoryRegistry(tmp_path / "registry"))
        for spec in specs:
            await registry.write(revision_key(spec.model, spec.revision), encode_revision(spec))
            wish = {"model": spec.model, "revision": spec.revision, "replicas": 1}
            await registry.write(f"{DESIRED}{spec.model}", json.dumps(wish).encode())
        metrics_registry = CollectorRegistry()
        dispatcher = Dispatcher(OrchestratorSettings(**settings), OrchestratorMetrics(metrics_registry))  # type: ignore[arg-type]
        pool = GroupPool(registry, 2**28, dispatcher.group_changed)
        server = create_server(ServerOptions("127.0.0.1:0"))
        LinkServer(dispatcher.on_exchange).attach(server)
        InferenceServicer(dispatcher).attach(server)
        endpoint = await server.start()
        stack.push_async_callback(server.stop, 0.0)
        link = create_link_client(endpoint)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        running = [tasks.create_task(each) for each in (
            dispatcher.follow_desired(registry), dispatcher.follow_revisions(registry), pool.run(), link.run(),
        )]
        for task in running:
            stack.callback(task.cancel)
        stack.callback(dispatcher.close)
        await link.wait_connected(Deadline.after(10.0))
        async with asyncio.timeout(10):
            while not all(dispatcher.knows(spec.model) for spec in specs):
                await asyncio.sleep(0.005)
        yield Bench(registry, dispatcher, pool, link, endpoint, stack, metrics_registry)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with orchestrator_bench(tmp_path, group_wait_s=0.5) as made:
        yield made

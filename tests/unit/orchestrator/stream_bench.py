"""A real orchestrator core in this process, between real links: scripted leaders below that say known answers, readers above."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry

from tensorway.deadline import Deadline
from tensorway.errors import TensorwayError
from tensorway.generation import GenerationLimits
from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import DESIRED, GROUP, Lease, Registration
from tensorway.revisions import encode_revision, revision_key
from tensorway.signature import Batching, RevisionSpec, Signature, TensorSpec
from tensorway.tensors import DataType
from tensorway.transport import LinkServer, create_link_client, create_server
from tensorway.transport.port import Exchange, LinkClient, Payload, Server, ServerOptions
from tensorway.v1 import inference_pb2 as pb
from tensorway.v1 import link_pb2
from tensorway_orchestrator.dispatcher import Dispatcher
from tensorway_orchestrator.generation_lane import GenerationLane
from tensorway_orchestrator.metrics import OrchestratorMetrics
from tensorway_orchestrator.pool import GroupPool
from tensorway_orchestrator.servicer import InferenceServicer
from tensorway_orchestrator.settings import OrchestratorSettings

REVISION = "cd" * 32
TEXT = TensorSpec("text", DataType.BYTES, ("rows",))
NUM_TOKENS = 40


def talker(max_sequences: int = 8, max_waiting: int = 64) -> RevisionSpec:
    return RevisionSpec(
        model="talker", revision=REVISION, version="1", description="", engine="transformers", signature=Signature((TEXT,), (TEXT,)),
        batching=Batching(), num_replicas=1, default_timeout_s=60.0, generation=GenerationLimits(max_sequences, max_waiting),
    )


def token_of(seed: int, choice: int, index: int) -> int:
    """The scripted model: what it says depends on the seed, the choice and the place alone."""
    return (seed * 31 + choice * 1009 + index * 7919) % 50_000


def text_of(seed: int, choice: int, index: int, num_tokens: int) -> str:
    """What the token adds to the text. Some add nothing, and their text comes with the next; the last holds nothing back."""

    def adds_nothing(place: int) -> bool:
        return place % 5 == 3 and place != num_tokens - 1

    if adds_nothing(index):
        return ""
    words = [token_of(seed, choice, place) for place in ((index - 1, index) if index and adds_nothing(index - 1) else (index,))]
    return "".join(f"{word}é " for word in words)


def whole_text(seed: int, choice: int, num_tokens: int = NUM_TOKENS) -> str:
    return "".join(f"{token_of(seed, choice, place)}é " for place in range(num_tokens))


@dataclass(eq=False)
class Saying:
    """One choice as a leader says it: a token a turn of the loop; without credit, several in one frame."""

    leader: Leader
    exchange: Exchange
    head: link_pb2.BatchHead
    request: link_pb2.RequestHead
    num_tokens: int
    place: int = 0
    waiting: pb.Delta | None = None
    is_over: bool = False

    def __post_init__(self) -> None:
        attempt = self.head.generation
        self.seed, self.choice = attempt.seed, attempt.choice
        so_far = list(attempt.so_far.token_ids)
        expected = [token_of(self.seed, self.choice, place) for place in range(len(so_far))]
        assert so_far == expected, "a group was told tokens that were never said"
        self.place = len(so_far)
        self.exchange.on_credit(self.flush)
        self.exchange.on_cancel(self.stop)
        self.needs_echo = self.request.generate.echo and not attempt.so_far.has_prompt
        self.loop = asyncio.get_running_loop()
        self.loop.call_soon(self.turn)

    def stop(self) -> None:
        if not self.is_over:
            self.is_over = True
            self.leader.cancelled.append(self.choice)

    def turn(self) -> None:
        """One step of the group."""
        if self.is_over:
            return
        if self.leader.is_dead(self):
            return
        if self.leader.pause.is_set():
            self.leader.stalled.append(self)
            return
        if self.needs_echo:
            self.needs_echo = False
            self.push(pb.Delta(text=self.request.generate.text, is_prompt=True))
        elif self.place < self.num_tokens:
            token = token_of(self.seed, self.choice, self.place)
            text = text_of(self.seed, self.choice, self.place, self.num_tokens)
            if self.waiting is None:
                self.waiting = pb.Delta(offset=self.place, token_ids=[token], text=text)
            else:
                self.waiting.token_ids.append(token)
                self.waiting.text += text
            self.place += 1
            self.leader.num_said += 1
        self.flush()
        if not self.is_over:
            self.loop.call_later(self.leader.step_s, self.turn) if self.leader.step_s else self.loop.call_soon(self.turn)

    def flush(self) -> None:
        if self.is_over:
            return
        if self.waiting is not None and self.exchange.credit:
            delta, self.waiting = self.waiting, None
            self.push(delta)
        if self.place == self.num_tokens and self.waiting is None and self.exchange.credit and not self.leader.is_dead(self):
            usage = pb.Usage(num_prompt_tokens=3, num_completion_tokens=self.num_tokens)
            finished = pb.Finished(reason=pb.FINISH_REASON_LENGTH, usage=usage)
            self.exchange.push(pb.GenerateResponse(finished=finished).SerializeToString())
            self.is_over = True
            if not self.leader.dies_before_reply:
                self.exchange.reply(b"", ())
            else:
                # What was said leaves first: a server that stops at once may take it along.
                asyncio.get_running_loop().call_later(0.1, self.leader.die)

    def push(self, delta: pb.Delta) -> None:
        assert self.exchange.credit
        self.exchange.push(pb.GenerateResponse(delta=delta).SerializeToString())


@dataclass(eq=False)
class Leader:
    """A scripted leader behind a real link server."""

    name: str
    server: Server
    stack: AsyncExitStack
    tasks: asyncio.TaskGroup
    links: LinkServer = field(init=False)
    lease: Lease | None = None
    num_tokens: int = NUM_TOKENS
    #: 0: a token in each turn of the loop.
    step_s: float = 0.0
    #: Dies instead of saying its next token once it has said so many; None: lives.
    dies_at: int | None = None
    dies_before_reply: bool = False
    #: Called instead of answering; True: it has answered.
    refuse: Callable[[Exchange], bool] = lambda exchange: False
    num_said: int = 0
    attempts: list[link_pb2.BatchHead] = field(default_factory=list)
    requests: list[link_pb2.RequestHead] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    pause: asyncio.Event = field(default_factory=asyncio.Event)
    stalled: list[Saying] = field(default_factory=list)
    has_died: bool = False

    def take(self, exchange: Exchange) -> None:
        head = link_pb2.BatchHead.FromString(exchange.head)
        request = link_pb2.RequestHead.FromString(head.requests[0])
        self.attempts.append(head)
        self.requests.append(request)
        if not self.refuse(exchange):
            Saying(self, exchange, head, request, request.generate.stop.max_tokens or self.num_tokens)

    def is_dead(self, saying: Saying) -> bool:
        if self.dies_at is not None and self.num_said >= self.dies_at and not self.has_died:
            self.die()
        return self.has_died

    def die(self) -> None:
        self.has_died = True
        self.tasks.create_task(self.server.stop(0.0))

    def go_on(self) -> None:
        """Ends a pause."""
        self.pause.clear()
        stalled, self.stalled = self.stalled, []
        for saying in stalled:
            saying.turn()


@dataclass(eq=False)
class Reader:
    """A gateway's end of one stream. See `tensorway.transport.port.TokenSink`."""

    link: LinkClient
    #: None: grants nothing of itself; 0: at once; else after so long.
    grants_after_s: float | None = 0.0
    id: int = 0
    messages: list[pb.GenerateResponse] = field(default_factory=list)
    num_ungranted: int = 0
    over: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def on_token(self, head: bytes) -> None:
        self.messages.append(pb.GenerateResponse.FromString(head))
        self._news.set()
        if self.grants_after_s is None:
            self.num_ungranted += 1
        elif self.grants_after_s:
            asyncio.get_running_loop().call_later(self.grants_after_s, self.link.grant, self.id, 1)
        else:
            self.link.grant(self.id, 1)

    def on_reply(self, head: bytes, payload: Payload) -> None:
        assert not head
        assert not payload
        self.over.set_result(None)
        self._news.set()

    def on_error(self, error: TensorwayError) -> None:
        self.over.set_exception(error)
        self._news.set()

    async def until(self, num_messages: int) -> None:
        """Until it has so many, or all there are: deltas may come joined."""
        async with asyncio.timeout(60):
            while len(self.messages) < num_messages and not self.over.done():
                self._news.clear()
                await self._news.wait()

    def grant_all(self) -> None:
        self.link.grant(self.id, self.num_ungranted)
        self.num_ungranted, self.grants_after_s = 0, 0.0

    async def end(self) -> None:
        async with asyncio.timeout(60):
            await self.over

    @property
    def started(self) -> pb.Started:
        return self.messages[0].started

    def ids(self, choice: int = 0) -> list[int]:
        return [id for each in self.messages if each.HasField("delta") and each.delta.choice == choice for id in each.delta.token_ids]

    def text(self, choice: int = 0) -> str:
        deltas = [each.delta for each in self.messages if each.HasField("delta") and not each.delta.is_prompt]
        return "".join(delta.text for delta in deltas if delta.choice == choice)

    def finished(self, choice: int = 0) -> pb.Finished:
        (found,) = (each.finished for each in self.messages if each.HasField("finished") and each.finished.choice == choice)
        return found


def check_whole(messages: list[pb.GenerateResponse], seed: int, num_choices: int = 1, num_tokens: int = NUM_TOKENS) -> None:
    """The messages are an undisturbed stream: numbered without gaps, no token missing or repeated, the same text."""
    assert [each.sequence for each in messages] == list(range(len(messages)))
    assert [each.HasField("started") for each in messages] == [True] + [False] * (len(messages) - 1)
    for choice in range(num_choices):
        ids: list[int] = []
        text = ""
        for each in messages:
            if each.HasField("delta") and each.delta.choice == choice and not each.delta.is_prompt:
                assert each.delta.offset == len(ids)
                ids += each.delta.token_ids
                text += each.delta.text
        assert ids == [token_of(seed, choice, place) for place in range(num_tokens)]
        assert text == whole_text(seed, choice, num_tokens)
        assert [each.finished.choice for each in messages if each.HasField("finished")].count(choice) == 1


@dataclass(eq=False)
class Bench:
    """The orchestrator under test and the means to drive it."""

    registry: DirectoryRegistry
    dispatcher: Dispatcher
    pool: GroupPool
    link: LinkClient
    endpoint: str
    stack: AsyncExitStack
    tasks: asyncio.TaskGroup
    metrics: CollectorRegistry

    @property
    def lane(self) -> GenerationLane:
        lane = self.dispatcher.lane("talker", "")
        assert isinstance(lane, GenerationLane)
        return lane

    def counted(self, name: str, **labels: str) -> float:
        value = self.metrics.get_sample_value(name, labels or {"model": "talker"})
        assert value is not None, f"nothing is counted as {name}"
        return value

    @property
    def num_parked(self) -> int:
        return int(self.metrics.get_sample_value("tensorway_orchestrator_parked_streams") or 0)

    async def add_leader(self, name: str, epoch: int = 1, dies_at: int | None = None) -> Leader:
        """A leader that is registered and connected, or was: it may have died since."""
        server = create_server(ServerOptions("127.0.0.1:0"))
        leader = Leader(name, server, self.stack, self.tasks, dies_at=dies_at)
        leader.links = LinkServer(leader.take)
        leader.links.attach(server)
        endpoint = await server.start()
        self.stack.push_async_callback(server.stop, 0.0)
        metadata = {"model": "talker", "revision": REVISION, "epoch": str(epoch), "node": "n", "max_rows": "8"}
        leader.lease = await self.registry.register(Registration(GROUP, name, endpoint, metadata))
        id = f"{name}#{epoch}"
        async with asyncio.timeout(60):
            while id not in self.lane.groups or not (self.lane.groups[id].lives or leader.has_died):
                await asyncio.sleep(0.002)
        return leader

    def generate(
        self, text: str = "hello", *, timeout_s: float = 20.0, grants_after_s: float | None = 0.0, link: LinkClient | None = None,
        **fields: object,
    ) -> Reader:
        """One stream over the link."""
        fields.setdefault("text", text)
        if "resume" in fields:
            del fields["text"]
        head = link_pb2.RequestHead(request_id="r", model="talker", generate=pb.GenerateRequest(**fields))  # type: ignore[arg-type]
        return self.send(head, timeout_s=timeout_s, grants_after_s=grants_after_s, link=link)

    def send(
        self, head: link_pb2.RequestHead, *, timeout_s: float = 20.0, grants_after_s: float | None = 0.0, link: LinkClient | None = None
    ) -> Reader:
        link = link or self.link
        reader = Reader(link, grants_after_s)
        reader.id = link.send(head.SerializeToString(), (), Deadline.after(timeout_s), reader)
        return reader

    def resume(self, stream_id: str, next_sequence: int, **options: object) -> Reader:
        return self.generate(resume=pb.Resume(stream_id=stream_id, next_sequence=next_sequence), **options)  # type: ignore[arg-type]

    async def connect(self) -> tuple[LinkClient, asyncio.Task[None]]:
        """Another gateway's link; cancelling the task breaks it."""
        link = create_link_client(self.endpoint)
        task = self.tasks.create_task(link.run())
        self.stack.callback(task.cancel)
        await link.wait_connected(Deadline.after(10.0))
        return link, task


async def eventually(is_so: Callable[[], bool]) -> None:
    """Returns once `is_so`; fails after ten seconds."""
    end_s = time.monotonic() + 10.0
    while not is_so():
        assert time.monotonic() < end_s, "it did not become so in 10 s"
        await asyncio.sleep(0.002)


@asynccontextmanager
async def stream_bench(tmp_path: Path, spec: RevisionSpec | None = None, **settings: object) -> AsyncIterator[Bench]:
    spec = spec or talker()
    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(DirectoryRegistry(tmp_path / "registry"))
        await registry.write(revision_key(spec.model, spec.revision), encode_revision(spec))
        await registry.write(f"{DESIRED}{spec.model}", json.dumps({"model": spec.model, "revision": spec.revision, "replicas": 1}).encode())
        metrics = CollectorRegistry()
        dispatcher = Dispatcher(OrchestratorSettings(**settings), OrchestratorMetrics(metrics))  # type: ignore[arg-type]
        pool = GroupPool(registry, 2**28, dispatcher.group_changed)
        server = create_server(ServerOptions("127.0.0.1:0"))
        LinkServer(dispatcher.on_exchange).attach(server)
        InferenceServicer(dispatcher).attach(server)
        endpoint = await server.start()
        stack.push_async_callback(server.stop, 0.0)
        link = create_link_client(endpoint)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        for each in (dispatcher.follow_desired(registry), dispatcher.follow_revisions(registry), pool.run(), link.run()):
            stack.callback(tasks.create_task(each).cancel)
        stack.callback(dispatcher.close)
        await link.wait_connected(Deadline.after(10.0))
        async with asyncio.timeout(60):
            while not dispatcher.knows(spec.model):
                await asyncio.sleep(0.002)
        bench = Bench(registry, dispatcher, pool, link, endpoint, stack, tasks, metrics)
        lane = bench.lane
        yield bench
        # Whatever a test did: what holds no stream holds no bytes, and nothing waits.
        if not lane.num_open:
            assert (lane.held.total, lane.queue.num_waiting) == (0, 0)

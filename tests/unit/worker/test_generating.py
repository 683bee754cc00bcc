"""The leader of a generating group: what it accepts, how it paces its frames by the reader's credit, and what it leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
from generating import made

from tensorway.deadline import Deadline
from tensorway.errors import FailedPrecondition, InvalidRequest, NotFound, Overloaded, TensorwayError, Unavailable
from tensorway.transport.port import TOKEN_CREDIT, Payload
from tensorway.v1 import inference_pb2, link_pb2
from tensorway_worker.engines.generation.engine import GenerationEngine
from tensorway_worker.rank.executor import Executor
from tensorway_worker.rank.generating import Generations
from tensorway_worker.rank.solo import SoloGroup

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="x")])
LONG_S = 60.0
EPOCH = 3


@dataclass
class Wanted:
    """An exchange whose reader grants what the test says."""

    head: bytes
    credit: int = TOKEN_CREDIT
    payload: Payload = ()
    deadline: Deadline = field(default_factory=lambda: Deadline.after(LONG_S))
    frames: list[inference_pb2.GenerateResponse] = field(default_factory=list)
    error: TensorwayError | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    cancels: list[Callable[[], None]] = field(default_factory=list)
    credits: list[Callable[[], None]] = field(default_factory=list)

    def push(self, head: bytes) -> None:
        assert self.credit > 0
        assert not self.over.is_set()
        self.credit -= 1
        self.frames.append(inference_pb2.GenerateResponse.FromString(head))

    def reply(self, head: bytes, payload: Payload) -> None:
        assert (head, payload) == (b"", ())
        self.over.set()

    def fail(self, error: TensorwayError) -> None:
        assert not self.over.is_set()
        self.error = error
        self.over.set()

    def on_cancel(self, callback: Callable[[], None]) -> None:
        self.cancels.append(callback)

    def on_credit(self, callback: Callable[[], None]) -> None:
        self.credits.append(callback)

    def grant(self, count: int) -> None:
        was, self.credit = self.credit, self.credit + count
        if not was:
            for callback in self.credits:
                callback()

    @property
    def deltas(self) -> list[inference_pb2.Delta]:
        return [frame.delta for frame in self.frames if frame.HasField("delta")]

    @property
    def ids(self) -> list[int]:
        return [token for delta in self.deltas if not delta.is_prompt for token in delta.token_ids]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas if not delta.is_prompt)


def head_of(request: inference_pb2.GenerateRequest, *, epoch: int = EPOCH, so_far: tuple[int, ...] = ()) -> bytes:
    one = link_pb2.RequestHead(request_id="r", model="tiny", generate=request).SerializeToString()
    attempt = link_pb2.GenerationAttempt(seed=7, num_attempts=1, so_far=link_pb2.GenerationSoFar(token_ids=so_far))
    return link_pb2.BatchHead(epoch=epoch, requests=[one], remaining_us=[10**7], generation=attempt).SerializeToString()


def ask(max_tokens: int = 12, text: str = "w5 w9 w33", **more: object) -> inference_pb2.GenerateRequest:
    stop = inference_pb2.Stop(max_tokens=max_tokens, ignore_eos=True)
    return inference_pb2.GenerateRequest(model="tiny", text=text, stop=stop, **more)  # type: ignore[arg-type]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def leader(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Generations]:
    directory = made(tmp_path_factory.mktemp("tiny"), generation={"max_sequences": 2})
    crashes: list[BaseException] = []
    executor = Executor(asyncio.get_running_loop(), 1, crashes.append)
    executor.start()
    engine = GenerationEngine(directory, "cpu")
    await executor.run(engine.load)
    generations = Generations(directory, engine, SoloGroup(engine), executor, EPOCH)
    await generations.start()
    yield generations
    generations.close()
    executor.stop()
    assert not crashes


async def answered(leader: Generations, wanted: Wanted) -> Wanted:
    leader.on_exchange(wanted)
    async with asyncio.timeout(LONG_S):
        await wanted.over.wait()
    return wanted


async def nothing_left(leader: Generations) -> None:
    async with asyncio.timeout(LONG_S):
        while leader.generator.num_answers or leader.generator.num_running:
            await asyncio.sleep(0.005)
    assert leader.generator.num_free_blocks == leader._engine.dimensions.num_blocks


async def test_a_reader_that_keeps_up_gets_every_token_by_itself(leader: Generations) -> None:
    wanted = Wanted(head_of(ask()), credit=100)
    await answered(leader, wanted)
    assert [len(delta.token_ids) for delta in wanted.deltas] == [1] * 12
    assert [delta.offset for delta in wanted.deltas] == list(range(12))
    finished = wanted.frames[-1].finished
    assert finished.reason == inference_pb2.FINISH_REASON_LENGTH
    assert (finished.usage.num_prompt_tokens, finished.usage.num_completion_tokens) == (3, 12)
    await nothing_left(leader)


async def test_a_reader_that_is_behind_gets_more_at_once_and_nothing_less(leader: Generations) -> None:
    undisturbed = await answered(leader, Wanted(head_of(ask(40)), credit=100))
    slow, other = Wanted(head_of(ask(40))), Wanted(head_of(ask(40, "w7 w8")), credit=100)
    leader.on_exchange(slow)
    await answered(leader, other)
    assert len(other.deltas) == 40, "nobody waits for another's reader"
    async with asyncio.timeout(LONG_S):
        while leader.generator.num_answers:
            await asyncio.sleep(0.005)
    assert len(slow.frames) == TOKEN_CREDIT
    assert not slow.over.is_set()
    slow.grant(1)
    assert len(slow.frames[-1].delta.token_ids) == 40 - TOKEN_CREDIT
    assert not slow.over.is_set(), "`finished` takes credit, too"
    slow.grant(1)
    assert slow.over.is_set()
    assert (slow.ids, slow.text) == (undisturbed.ids, undisturbed.text)
    assert slow.frames[-1].finished == undisturbed.frames[-1].finished
    await nothing_left(leader)


async def test_one_who_gives_no_credit_at_all_is_heard_of_when_he_does(leader: Generations) -> None:
    wanted = Wanted(head_of(ask(5, echo=True)), credit=0)
    leader.on_exchange(wanted)
    await asyncio.sleep(0.2)
    assert not wanted.frames
    for _ in range(3):
        wanted.grant(1)
    async with asyncio.timeout(LONG_S):
        await wanted.over.wait()
    prompt, answer = wanted.deltas
    assert prompt.is_prompt
    assert (prompt.text, list(prompt.token_ids)) == ("w5 w9 w33", [5, 9, 33])
    assert len(answer.token_ids) == 5


async def test_an_answer_goes_on_from_what_the_client_has(leader: Generations) -> None:
    whole = await answered(leader, Wanted(head_of(ask()), credit=100))
    rest = await answered(leader, Wanted(head_of(ask(), so_far=tuple(whole.ids[:5])), credit=100))
    assert rest.ids == whole.ids[5:]
    assert rest.deltas[0].offset == 5
    assert whole.text.endswith(rest.text)
    complete = await answered(leader, Wanted(head_of(ask(), so_far=tuple(whole.ids)), credit=100))
    assert not complete.deltas
    assert complete.frames[-1].finished.reason == inference_pb2.FINISH_REASON_LENGTH


async def test_cancelled_answers_leave_nothing(leader: Generations) -> None:
    for wait_s in (0.0, 0.01, 0.1):
        wanted = Wanted(head_of(ask(200)), credit=1000)
        leader.on_exchange(wanted)
        await asyncio.sleep(wait_s)
        for callback in wanted.cancels:
            callback()
        count = len(wanted.frames)
        await nothing_left(leader)
        assert len(wanted.frames) == count
    assert leader._num_open == 0


@pytest.mark.parametrize(
    ("head", "kind", "says"),
    [
        (head_of(ask(), epoch=2), Unavailable, "epoch 3"),
        (b"\xff", InvalidRequest, "BatchHead"),
        (link_pb2.BatchHead(epoch=EPOCH, requests=[b""]).SerializeToString(), InvalidRequest, "generation"),
        (head_of(ask(text="")), InvalidRequest, "no tokens"),
        (head_of(ask(text="w5 " * 300)), InvalidRequest, "tokens"),
        (head_of(inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[96]))), InvalidRequest, "outside the vocabulary"),
        (head_of(inference_pb2.GenerateRequest(chat=CHAT)), InvalidRequest, "no chat"),
    ],
)
async def test_what_cannot_be_answered_is_said(leader: Generations, head: bytes, kind: type[TensorwayError], says: str) -> None:
    wanted = await answered(leader, Wanted(head))
    assert isinstance(wanted.error, kind)
    assert says in wanted.error.message
    await nothing_left(leader)


async def test_more_than_can_wait_are_sent_back(leader: Generations) -> None:
    many = [Wanted(head_of(ask(100)), credit=1000) for _ in range(9)]
    for one in many:
        leader.on_exchange(one)
    assert isinstance(many[-1].error, Overloaded)
    assert many[-1].error.retry_after_s > 0
    for one in many[:-1]:
        assert one.error is None
        for callback in one.cancels:
            callback()
    await nothing_left(leader)


async def test_infer_and_another_model_are_refused(leader: Generations) -> None:
    with pytest.raises(FailedPrecondition, match="call Generate here"):
        await leader._refuse(b"", None)  # type: ignore[arg-type]
    from tensorway_worker.rank.generation_wire import read_asked

    with pytest.raises(NotFound, match="this group serves tiny"):
        read_asked(inference_pb2.GenerateRequest(model="other").SerializeToString(), leader._directory.spec)


async def test_a_drain_lets_answers_end(tmp_path: Path) -> None:
    directory = made(tmp_path)
    executor = Executor(asyncio.get_running_loop(), 1, lambda error: None)
    executor.start()
    engine = GenerationEngine(directory, "cpu")
    await executor.run(engine.load)
    leader = Generations(directory, engine, SoloGroup(engine), executor, EPOCH)
    await leader.start()
    running = Wanted(head_of(ask(60)), credit=100)
    leader.on_exchange(running)
    drain = asyncio.ensure_future(leader.drain(Deadline.after(LONG_S)))
    await asyncio.sleep(0)
    late = Wanted(head_of(ask()))
    leader.on_exchange(late)
    assert isinstance(late.error, Unavailable)
    assert await drain == 0
    assert len(running.ids) == 60
    stuck = [Wanted(head_of(ask()), credit=0)]
    leader._is_draining = False
    leader.on_exchange(stuck[0])
    assert await leader.drain(Deadline.after(0.3)) == 1
    leader.close()
    executor.stop()

"""The threads of a generating group: who joins, who leaves, who is told what. A real engine of a small model, and real threads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
import torch
from generating import SIZES, VOCABULARY, made, prompts, reference

from tensorway.errors import DeadlineExceeded, InvalidRequest, ModelFailed, TensorwayError, Unavailable
from tensorway.model import Inputs, Outputs
from tensorway_worker.engines.generation.answer import Advance
from tensorway_worker.engines.generation.blocks import BlockPool
from tensorway_worker.engines.generation.engine import GenerationEngine
from tensorway_worker.engines.generation.generator import Generator
from tensorway_worker.engines.generation.requests import Finish, FinishReason, GenerationRequest, Sampling, StopRules
from tensorway_worker.engines.generation.scheduler import Limits, Scheduler

pytestmark = pytest.mark.asyncio
LONG_S = 60.0


@dataclass
class Heard:
    """A listener that keeps all it is told."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    offsets: list[int] = field(default_factory=list)
    finish: Finish | None = None
    error: TensorwayError | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    on_advance: Callable[[Heard], None] | None = None

    def advanced(self, advance: Advance) -> None:
        assert not self.over.is_set()
        self.offsets.append(advance.offset)
        self.ids += advance.token_ids
        self.text += advance.text
        if self.on_advance is not None:
            self.on_advance(self)

    def finished(self, finish: Finish) -> None:
        assert not self.over.is_set()
        self.finish = finish
        self.over.set()

    def failed(self, error: TensorwayError) -> None:
        assert not self.over.is_set()
        self.error = error
        self.over.set()


@dataclass
class Bench:
    """A generator over a real engine, whose steps can be held and made to fail."""

    engine: GenerationEngine
    pool: BlockPool
    scheduler: Scheduler
    gate: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None
    is_the_end: bool = False
    num_steps: int = 0
    num_rows: list[int] = field(default_factory=list)
    #: Set by the first step that began.
    began: threading.Event = field(default_factory=threading.Event)

    def run(self, carry: Inputs) -> Outputs:
        self.began.set()
        assert self.gate.wait(LONG_S)
        self.num_steps += 1
        self.num_rows.append(len(carry["~rows"]))
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        with torch.inference_mode():
            return self.engine.run(carry)

    def fail(self, error: Exception) -> TensorwayError:
        if self.is_the_end:
            raise error
        return ModelFailed(f"a step raised {error}")

    def start(self) -> Generator:
        self.gate.set()
        assert self.engine.text is not None
        generator = Generator(self.scheduler, self.engine.text, 128, self.run, self.fail)
        generator.start()
        return generator


def ask(
    prompt: list[int], max_tokens: int = 10, *, so_far: tuple[int, ...] = (), timeout_s: float = LONG_S, **stop: object
) -> GenerationRequest:
    rules = StopRules(max_tokens=max_tokens, **stop)  # type: ignore[arg-type]
    return GenerationRequest("r", tuple(prompt), so_far, Sampling(), rules, 0, time.monotonic() + timeout_s)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> GenerationEngine:
    made_engine = GenerationEngine(made(tmp_path_factory.mktemp("tiny")), "cpu")
    made_engine.load()
    return made_engine


@pytest.fixture
def bench(engine: GenerationEngine) -> Bench:
    pool = BlockPool(60, 4)
    return Bench(engine, pool, Scheduler(pool, Limits(8, 32)))


@pytest_asyncio.fixture
async def generator(bench: Bench) -> AsyncIterator[Generator]:
    started = bench.start()
    yield started
    bench.gate.set()
    started.close()
    for thread in started._threads:
        await asyncio.to_thread(thread.join, LONG_S)
        assert not thread.is_alive()


async def idle(bench: Bench, generator: Generator) -> None:
    """Until nothing is held any more."""
    async with asyncio.timeout(LONG_S):
        while generator.num_answers or bench.pool.num_free != bench.pool.num_blocks:
            await asyncio.sleep(0.005)


async def test_answers_are_those_of_generate_with_their_usage(bench: Bench, generator: Generator) -> None:
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    asked = prompts(12, 30)
    heard = [Heard() for _ in asked]
    for prompt, one in zip(asked, heard, strict=True):
        generator.submit(ask(prompt), one)
    await asyncio.gather(*(one.over.wait() for one in heard))
    for prompt, one in zip(asked, heard, strict=True):
        assert one.ids == reference(model, prompt, 10)
        assert one.offsets == list(range(10))
        assert one.finish is not None
        assert one.finish.reason is FinishReason.LENGTH
        assert (one.finish.usage.num_prompt_tokens, one.finish.usage.num_completion_tokens) == (len(prompt), 10)
    assert max(bench.num_rows) > 1
    await idle(bench, generator)


async def test_a_cancelled_answer_is_out_within_one_step(bench: Bench, generator: Generator) -> None:
    first, second = Heard(), Heard()
    id = generator.submit(ask([3] * 8, 100), first)
    generator.submit(ask([4] * 8, 100), second)
    async with asyncio.timeout(LONG_S):
        while len(first.ids) < 3 or len(second.ids) < 3:
            await asyncio.sleep(0.001)
    bench.gate.clear()
    held = bench.pool.num_free
    generator.cancel(id)
    before = bench.num_steps
    bench.gate.set()
    async with asyncio.timeout(LONG_S):
        while bench.num_steps < before + 3:
            await asyncio.sleep(0.001)
    # At most the step that was on its way still had it.
    assert set(bench.num_rows[before + 1 :]) == {1}
    assert bench.pool.num_free > held
    await second.over.wait()
    assert first.finish is None
    assert first.error is None
    await idle(bench, generator)


async def test_a_deadline_ends_an_answer_and_one_that_waits(bench: Bench, generator: Generator) -> None:
    bench.gate.clear()
    late = Heard()
    generator.submit(ask([3] * 8, 100, timeout_s=0.05), late)
    await asyncio.sleep(0.1)
    bench.gate.set()
    async with asyncio.timeout(LONG_S):
        await late.over.wait()
    assert isinstance(late.error, DeadlineExceeded)
    assert late.error.hop == "group"
    await idle(bench, generator)
    bench.gate.clear()
    others = [Heard() for _ in range(9)]
    for one in others[:8]:
        generator.submit(ask([3] * 8, 2), one)
    generator.submit(ask([3] * 8, 100, timeout_s=0.05), others[8])
    await asyncio.sleep(0.1)
    bench.gate.set()
    async with asyncio.timeout(LONG_S):
        for one in others:
            await one.over.wait()
    assert isinstance(others[8].error, DeadlineExceeded)
    assert all(one.finish is not None for one in others[:8])
    await idle(bench, generator)


async def test_a_failed_step_costs_those_who_were_in_it(bench: Bench, generator: Generator) -> None:
    guilty = Heard()
    bench.failure = RuntimeError("no luck")
    generator.submit(ask([3] * 8), guilty)
    await guilty.over.wait()
    assert isinstance(guilty.error, ModelFailed)
    assert "no luck" in guilty.error.message
    fine = Heard()
    generator.submit(ask([3] * 8), fine)
    await fine.over.wait()
    assert fine.finish is not None
    await idle(bench, generator)


async def held_step(bench: Bench, generator: Generator) -> list[Heard]:
    """One answer in a step that is held, and eleven whose requests nobody has read yet."""
    bench.gate.clear()
    heard = [Heard() for _ in range(12)]
    generator.submit(ask([3] * 8), heard[0])
    assert await asyncio.to_thread(bench.began.wait, LONG_S)
    for one in heard[1:]:
        generator.submit(ask([3] * 8), one)
    assert len(generator._inbox) == 11
    return heard


async def told(heard: list[Heard], what: str) -> None:
    async with asyncio.timeout(LONG_S):
        for one in heard:
            await one.over.wait()
            assert isinstance(one.error, Unavailable)
            assert what in one.error.message


async def test_the_end_of_the_group_is_told_to_all(bench: Bench, generator: Generator) -> None:
    heard = await held_step(bench, generator)
    bench.failure, bench.is_the_end = RuntimeError("rank 1 is gone"), True
    bench.gate.set()
    await told(heard, "rank 1 is gone")
    late = Heard()
    generator.submit(ask([3] * 8), late)
    await told([late], "rank 1 is gone")
    await idle(bench, generator)


async def test_the_close_is_told_to_all(bench: Bench, generator: Generator) -> None:
    heard = await held_step(bench, generator)
    generator.close()
    late = Heard()
    generator.submit(ask([3] * 8), late)
    await told([*heard, late], "the group is stopping")
    bench.gate.set()
    await idle(bench, generator)


async def test_what_the_client_has_is_not_said_again(bench: Bench, generator: Generator) -> None:
    whole = Heard()
    prompt = [5, 9, 33, 71]
    generator.submit(ask(prompt, 12), whole)
    await whole.over.wait()
    for length in range(13):
        rest = Heard()
        generator.submit(ask(prompt, 12, so_far=tuple(whole.ids[:length])), rest)
        await rest.over.wait()
        assert rest.ids == whole.ids[length:]
        assert rest.finish is not None
        assert whole.finish is not None
        assert rest.finish.reason is whole.finish.reason
        assert rest.finish.usage.num_completion_tokens == 12
        assert whole.text.endswith(rest.text)
    await idle(bench, generator)


async def test_tokens_that_end_an_answer(bench: Bench, generator: Generator) -> None:
    whole = Heard()
    generator.submit(ask([5, 9, 33], 8), whole)
    await whole.over.wait()
    place = next(index for index, token in enumerate(whole.ids) if token not in whole.ids[:index] and index > 1)
    end = whole.ids[place]
    stopped, ended, later, unspoken = Heard(), Heard(), Heard(), Heard()
    generator.submit(ask([5, 9, 33], 8, token_ids=frozenset({end})), stopped)
    generator.submit(ask([5, 9, 33], 8, eos_ids=frozenset({end})), ended)
    generator.submit(ask([5, 9, 33], 8, eos_ids=frozenset({end}), min_tokens=place + 2), later)
    generator.submit(ask([5, 9, 33], 8, strings=(f"w{whole.ids[2]}",)), unspoken)
    for one in (stopped, ended, later, unspoken):
        await one.over.wait()
        assert one.finish is not None
    assert (stopped.finish.reason, stopped.ids) == (FinishReason.STOP_TOKEN, whole.ids[: place + 1])
    assert (ended.finish.reason, ended.ids) == (FinishReason.EOS, whole.ids[: place + 1])
    assert end not in later.ids[: place + 2]
    assert len(later.ids) > place + 1
    assert unspoken.finish.reason is FinishReason.STOP_STRING
    assert f"w{whole.ids[2]}" not in unspoken.text
    await idle(bench, generator)


async def test_a_prompt_without_room_is_refused(generator: Generator) -> None:
    with pytest.raises(InvalidRequest, match="has 128 tokens, and the model takes 127"):
        generator.submit(ask([3] * 128), Heard())


async def test_answers_end_where_the_context_ends(generator: Generator) -> None:
    heard = Heard()
    generator.submit(ask([3] * 120, 100), heard)
    await heard.over.wait()
    assert heard.finish is not None
    assert (heard.finish.reason, len(heard.ids)) == (FinishReason.LENGTH, 8)


async def test_many_come_and_go(bench: Bench, generator: Generator) -> None:
    chance = torch.Generator().manual_seed(1)
    heard: list[tuple[Heard, bool]] = []

    async def one(number: int) -> None:
        await asyncio.sleep(number % 7 * 0.003)
        mine = Heard()
        length = int(torch.randint(1, 40, (1,), generator=chance))
        id = generator.submit(ask([3 + (number + place) % (VOCABULARY - 3) for place in range(length)], 1 + number % 9), mine)
        is_cancelled = number % 3 == 0
        heard.append((mine, is_cancelled))
        if is_cancelled:
            await asyncio.sleep(number % 5 * 0.004)
            generator.cancel(id)
        else:
            await mine.over.wait()
            assert mine.finish is not None

    async with asyncio.timeout(LONG_S), asyncio.TaskGroup() as tasks:
        for number in range(90):
            tasks.create_task(one(number))
    await idle(bench, generator)
    assert bench.scheduler.num_running == bench.scheduler.num_waiting == 0

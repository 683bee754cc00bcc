"""What a client of a real language model gets: the tokens of transformers' own `generate`, through every door. How streams share a mesh."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from statistics import median
from typing import Any

import grpc
import pytest
import pytest_asyncio

from tensorway import AsyncClient, Client, Delta
from tensorway.errors import InvalidRequest
from tensorway.registry.port import GATEWAY, ORCHESTRATOR
from tensorway.transport.channel import ReplyStream
from tensorway.v1 import inference_pb2 as pb
from tests.integration.conftest import ROOT, running_mesh
from tests.integration.generate_world import GENERATE, Call, Talk, Told, ask, small, talk_of
from tests.integration.hurt_groups import real

pytestmark = [pytest.mark.models, pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.asyncio(loop_scope="module")]

CHAT = "smollm2-chat"
NUM_TOKENS = 24
#: Of the small models.
NUM_LAYERS = 12
QUESTIONS = (
    "What is the capital of France?", "Name three colours.", "Why is the sky blue?", "Write one sentence about a cat.",
    "What is 2 + 2?", "Who wrote Hamlet?", "Translate 'good morning' to Spanish.", "Give me a recipe for tea.",
)
TRITON_PYTHON = ROOT / ".venv-triton" / "bin" / "python"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def talk(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Talk]:
    """The real model; and a small one, with two groups, of shards, and of shards of stages."""
    folder = tmp_path_factory.mktemp("talk")
    models = folder / "models"
    twin = small(models, "twin", num_layers=NUM_LAYERS, longest=1024, replicas=2, generation={"kv_cache_mb": 64})
    # Threads that wait for one another cost a busy machine far more than they gain.
    real(models, CHAT, CHAT, threads=1)
    cut = [small(models, f"cut-{pipeline}x2", pipeline, 2, num_layers=NUM_LAYERS) for pipeline in (1, 2)]
    async with running_mesh(folder, twin, CHAT, *cut, models_dir=models, spread_wait_s=0.05) as mesh, talk_of(mesh) as made:
        yield made


@pytest.fixture(scope="module")
def theirs() -> tuple[Any, Any]:
    """The model and its tokeniser, as transformers alone knows them: smollm2's file and smollm2-chat's are the same."""
    from tests.unit.worker.smollm2 import transformers_own, transformers_tokenizer

    return transformers_own(), transformers_tokenizer()


def chat(question: str, max_tokens: int = NUM_TOKENS, **more: Any) -> pb.GenerateRequest:
    """Asks the real model; it may end its answer where it likes."""
    request = ask(CHAT, (), max_tokens, ignore_eos=False, **more)
    request.chat.messages.add(role="user", content=question)
    return request


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False)
    return list(ids)


def continued(model: Any, prompt: Sequence[int]) -> list[int]:
    """What `generate` makes of a prompt, its last token perhaps the one that ends an answer."""
    import torch

    ids = torch.tensor([list(prompt)])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False)
    return [int(token) for token in found[0, len(prompt) :]]


async def test_greedy_answers_are_those_of_generate(talk: Talk, theirs: tuple[Any, Any]) -> None:
    """Eight chats at once, each with its prompt given back."""
    model, tokenizer = theirs
    told = await asyncio.gather(*(talk.answer(chat(question, echo=True)) for question in QUESTIONS))
    reasons = set()
    for question, one in zip(QUESTIONS, told, strict=True):
        prompt = prompt_ids(tokenizer, question)
        (echoed,) = [message.delta for message in one.messages if message.delta.is_prompt]
        assert list(echoed.token_ids) == prompt
        assert echoed.text == tokenizer.decode(prompt)
        wanted = await asyncio.to_thread(continued, model, prompt)
        assert one.ids() == wanted, question
        assert one.text() == tokenizer.decode(wanted, skip_special_tokens=True)
        end = one.finished()
        has_ended = wanted[-1] == tokenizer.eos_token_id
        assert end.reason == (pb.FINISH_REASON_EOS if has_ended else pb.FINISH_REASON_LENGTH)
        assert (end.usage.num_prompt_tokens, end.usage.num_completion_tokens) == (len(prompt), len(wanted))
        reasons.add(end.reason)
    assert len(reasons) == 2, "answers of both kinds are wanted here"


async def test_an_answer_ends_at_a_stop_string(talk: Talk) -> None:
    whole = (await talk.answer(chat(QUESTIONS[2]))).text()
    stop = whole[len(whole) // 2 :][:5]
    for is_included in (False, True):
        told = await talk.answer(chat(QUESTIONS[2], strings=["never said", stop], include_stop=is_included))
        assert told.text() == whole[: whole.index(stop)] + (stop if is_included else "")
        assert (told.finished().reason, told.finished().stop_match) == (pb.FINISH_REASON_STOP_STRING, stop)


async def test_log_probabilities_are_those_of_the_model(talk: Talk, theirs: tuple[Any, Any]) -> None:
    import torch

    model, tokenizer = theirs
    told = await talk.answer(chat(QUESTIONS[0], num_top_logprobs=3))
    said = [logprob for delta in told.deltas() for logprob in delta.logprobs]
    prompt, ids = prompt_ids(tokenizer, QUESTIONS[0]), told.ids()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    wanted = torch.log_softmax(logits.float(), -1)
    assert len(said) == len(ids)
    for row, token, logprob in zip(wanted, ids, said, strict=True):
        top = row.topk(3)
        assert logprob.logprob == pytest.approx(float(row[token]), abs=2e-3)
        assert [one.token_id for one in logprob.top] == top.indices.tolist()
        assert [one.logprob for one in logprob.top] == pytest.approx(top.values.tolist(), abs=2e-3)


async def test_choices_differ_and_repeat_by_their_seed(talk: Talk) -> None:
    request = chat(QUESTIONS[3], num_choices=3, temperature=1.0)
    first = await talk.answer(request)
    assert len({tuple(first.ids(choice)) for choice in range(3)}) == 3
    request.sampling.seed = first.started.seed
    (await talk.answer(request)).is_same(first, 3)
    request.sampling.seed += 1
    other = await talk.answer(request)
    assert other.ids(0) != first.ids(0)


async def test_infer_gives_whole_texts(talk: Talk) -> None:
    texts = ["The capital of France is", "Once upon a time"]
    async with AsyncClient(talk.mesh.endpoint) as client:
        result = await client.infer(CHAT, {"text": texts}, parameters={"max_tokens": 12}, timeout_s=120)
    wanted = [(await talk.answer(ask(CHAT, text, 12, ignore_eos=False))).text() for text in texts]
    assert [bytes(text).decode() for text in result["text"]] == wanted
    assert all(wanted)


async def test_every_hop_generates_when_called_alone(talk: Talk) -> None:
    members = [(await talk.mesh.members(kind))[0].endpoint for kind in (GATEWAY, ORCHESTRATOR)]
    members += [row.endpoint for row in await talk.mesh.leaders() if row.metadata["model"] == CHAT]
    whole, *others = [await talk.answer(chat(QUESTIONS[5]), endpoint) for endpoint in members]
    assert len(others) == 2
    for told in others:
        assert (told.ids(), told.text(), told.finished().reason) == (whole.ids(), whole.text(), whole.finished().reason)


async def test_the_python_client_streams(talk: Talk) -> None:
    messages = [{"role": "user", "content": QUESTIONS[5]}]
    whole = await talk.answer(chat(QUESTIONS[5]))

    def use() -> str:
        with Client(talk.mesh.endpoint) as client:
            return "".join(client.generate_text(CHAT, messages, max_tokens=NUM_TOKENS, timeout_s=120))

    assert await asyncio.to_thread(use) == whole.text()
    async with AsyncClient(talk.mesh.endpoint) as client:
        events = [event async for event in client.generate(CHAT, messages, max_tokens=NUM_TOKENS, timeout_s=120)]
        assert [token for event in events if isinstance(event, Delta) for token in event.token_ids] == whole.ids()
        with pytest.raises(InvalidRequest, match="prompt"):
            _ = [event async for event in client.generate(CHAT, "word " * 10_000, max_tokens=1, timeout_s=120)]


async def test_tritonclient_streams(talk: Talk) -> None:
    script = ROOT / "tests" / "integration" / "triton_stream_script.py"
    process = await asyncio.create_subprocess_exec(
        TRITON_PYTHON, script, talk.mesh.endpoint, CHAT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 240)
    assert process.returncode == 0, output.decode()
    assert output.decode().endswith("all good\n")


@pytest.mark.parametrize("model", ["cut-1x2", "cut-2x2"])
async def test_shards_say_what_the_whole_model_says(talk: Talk, model: str) -> None:
    """Alone and several at once, greedy and drawn."""
    prompts = [[3 + (number * step) % 91 for number in range(length)] for step, length in ((5, 40), (7, 21), (11, 3))]
    requests = [(prompt, draw) for prompt in prompts for draw in ({}, {"temperature": 0.8, "seed": 4})]
    whole = await asyncio.gather(*(talk.answer(ask("twin", prompt, 20, **draw)) for prompt, draw in requests))
    cut = await asyncio.gather(*(talk.answer(ask(model, prompt, 20, **draw)) for prompt, draw in requests))
    for told, wanted in zip(cut, whole, strict=True):
        told.is_same(wanted)


async def test_a_prompt_goes_where_its_beginning_is_known(talk: Talk) -> None:
    await talk.serving("twin", 2)
    beginning = [3 + number * number % 91 for number in range(600)]
    await talk.answer(ask("twin", [*beginning, 5], 2))
    cached = [(await talk.answer(ask("twin", [*beginning, 6 + number], 2))).finished().usage.num_cached_tokens for number in range(10)]
    assert sum(count > 500 for count in cached) >= 9, cached


async def timed(talk: Talk, request: pb.GenerateRequest) -> tuple[Told, float]:
    """An answer, and the median time between two of its messages, seconds."""
    arrived: list[float] = []
    async with talk.call(request) as call:
        while await call.next() is not None:
            arrived.append(asyncio.get_running_loop().time())
    return call.told, median(after - before for before, after in pairwise(arrived))


@asynccontextmanager
async def narrow(talk: Talk) -> AsyncIterator[Any]:
    """A connection to the gateway that holds 64 KiB and does not widen when there is much to carry."""
    async with grpc.aio.insecure_channel(talk.mesh.endpoint, options=[("grpc.http2.bdp_probe", 0)]) as channel:
        yield channel


async def test_a_slow_reader_slows_nobody_and_misses_nothing(talk: Talk) -> None:
    """Many long messages to one who does not read: what the connection does not hold is joined. Another reads meanwhile."""
    prompt = list(range(3, 13))
    long = ask("twin", prompt, 240, num_choices=8, temperature=1.0, seed=3, num_top_logprobs=20)
    other = ask("twin", prompt, 200)
    beside_a_reader, (_, fast_s) = await asyncio.gather(talk.answer(long), timed(talk, other))
    async with narrow(talk) as channel, Call(ReplyStream("", channel.unary_stream(GENERATE)(long.SerializeToString()))) as slow:
        await slow.next()
        told, slow_s = await timed(talk, other)
        first = told.deltas()[0]
        assert (first.offset, len(first.token_ids)) == (0, 1)
        for group in await talk.groups("twin"):
            await talk.until_group("twin", lambda one, id=group.id: one.id == id and one.num_running_answers == 0)  # type: ignore[misc]
        await slow.rest()
    assert slow_s < 10 * fast_s, (slow_s, fast_s)
    slow.told.is_same(beside_a_reader, 8)
    assert sum(len(slow.told.ids(choice)) for choice in range(8)) == 8 * 240
    assert len(slow.told.messages) < len(beside_a_reader.messages) / 2


async def test_text_goes_on_where_its_group_died(talk: Talk) -> None:
    """Letters of several tokens, and what might have become a stop string, are on their way when the leader is killed."""
    request = chat("Write a poem of emojis and of Chinese words.", 60, temperature=1.3, seed=12)
    request.stop.ignore_eos = True
    text = (await talk.answer(request)).text()
    request.stop.strings.extend([*(letter + "never" for letter in sorted(set(text))[:12]), text[-8:]])
    whole = await talk.answer(request)
    assert not whole.text().isascii()
    for _ in range(8):
        async with talk.call(request) as call:
            await call.tokens(9)
            await talk.kill_leader(whole.finished().group)
            told = await call.rest()
        told.is_same(whole)
        if told.finished().num_attempts > 1:
            return
        whole = told
    raise AssertionError("no signal came before the end")

"""What a leader reads of a generation's request, and what it writes of the answer."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_sides import smollm2_text

from tensorway.errors import InvalidRequest, NotFound, Unavailable
from tensorway.generation import GenerationYaml, SamplingDefaultsYaml
from tensorway.signature import Batching, RevisionSpec, Signature
from tensorway.v1 import inference_pb2, link_pb2
from tensorway_worker.engines.generation.answer import Advance
from tensorway_worker.engines.generation.requests import Finish, FinishReason, GenerationRequest, Logprob, Sampling, Usage
from tensorway_worker.rank.generation_wire import (
    PromptDelta,
    delta_bytes,
    finished_bytes,
    joined,
    read_asked,
    read_attempt,
    seed_of,
)

_CONTEXT = 100
_SPEC = RevisionSpec("smollm2-chat", "ab" * 32, "1", "", "transformers", Signature((), ()), Batching(), 1, 60.0)

pytestmark = pytest.mark.models


def _head(generate: inference_pb2.GenerateRequest, epoch: int = 3, **attempt: Any) -> bytes:
    request = link_pb2.RequestHead(request_id="r-1", priority=5, generate=generate)
    generation = link_pb2.GenerationAttempt(num_attempts=1, **attempt)
    return link_pb2.BatchHead(epoch=epoch, requests=[request.SerializeToString()], generation=generation).SerializeToString()


def _read(
    generate: inference_pb2.GenerateRequest, yaml: GenerationYaml = GenerationYaml(), **attempt: Any  # noqa: B008 - frozen
) -> tuple[GenerationRequest, PromptDelta | None]:
    return read_attempt(_head(generate, **attempt), 3).read(smollm2_text(), yaml, _CONTEXT, 12.5)


def _text(text: str = "The capital of France is", **fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(model="smollm2-chat", text=text, **fields)


def test_all_fields_are_read() -> None:
    sampling = inference_pb2.Sampling(temperature=0.5, top_k=7, top_p=0.75, min_p=0.25, repetition_penalty=1.5)
    stop = inference_pb2.Stop(max_tokens=20, min_tokens=2, strings=["\n", "END"], token_ids=[5, 6], include_stop=True)
    request, prompt = _read(_text(sampling=sampling, stop=stop, num_top_logprobs=0), seed=2**64 - 1)
    assert request.sampling == Sampling(0.5, 7, 0.75, 0.25, 1.5, 2**64 - 1)
    assert request.prompt_ids == smollm2_text().encode("The capital of France is")
    assert (request.request_id, request.priority, request.deadline_s, request.num_top_logprobs) == ("r-1", 5, 12.5, 0)
    assert (request.stop.max_tokens, request.stop.min_tokens, request.stop.strings) == (20, 2, ("\n", "END"))
    assert (request.stop.token_ids, request.stop.eos_ids, request.stop.include_stop) == ({5, 6}, {2}, True)
    assert (request.so_far, prompt) == ((), None)


def test_what_is_left_open_comes_from_the_model() -> None:
    defaults = SamplingDefaultsYaml(temperature=0.5, top_k=9, top_p=0.5, min_p=0.125, repetition_penalty=1.25, max_tokens=30)
    request, _ = _read(_text(), GenerationYaml(defaults=defaults))
    assert request.sampling == Sampling(0.5, 9, 0.5, 0.125, 1.25, 0)
    assert (request.stop.max_tokens, request.num_top_logprobs) == (30, None)
    explicit = inference_pb2.Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    endless = inference_pb2.Stop(max_tokens=99_999, ignore_eos=True)
    request, _ = _read(_text(sampling=explicit, stop=endless), GenerationYaml(defaults=defaults))
    assert request.sampling == Sampling()
    assert request.stop.max_tokens == _CONTEXT - len(request.prompt_ids)
    assert request.stop.eos_ids == frozenset()
    assert _read(_text())[0].stop.max_tokens == _CONTEXT - len(request.prompt_ids)


def test_chats_and_token_ids_are_prompts_and_come_back() -> None:
    text = smollm2_text()
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="Hi")])
    request, prompt = _read(inference_pb2.GenerateRequest(chat=chat, echo=True))
    assert request.prompt_ids == text.encode_chat([{"role": "user", "content": "Hi"}])
    assert prompt is not None
    assert prompt.text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    delta = inference_pb2.GenerateResponse.FromString(prompt.to_bytes()).delta
    assert (delta.is_prompt, tuple(delta.token_ids), delta.offset) == (True, request.prompt_ids, 0)
    ids = inference_pb2.TokenIds(ids=request.prompt_ids)
    again, echoed = _read(inference_pb2.GenerateRequest(token_ids=ids, echo=True))
    assert (again.prompt_ids, echoed) == (request.prompt_ids, prompt)
    written = _read(_text("  \u4f60<|im_end|>", echo=True))[1]
    assert written is not None
    assert written.text == "  \u4f60<|im_end|>"
    assert _read(_text(echo=True), so_far=link_pb2.GenerationSoFar(has_prompt=True))[1] is None


def test_an_attempt_goes_on_from_what_the_client_has() -> None:
    so_far = link_pb2.GenerationSoFar(token_ids=[10, 20, 30])
    request, _ = _read(_text(stop=inference_pb2.Stop(max_tokens=3)), so_far=so_far, choice=2, seed=7)
    assert request.so_far == (10, 20, 30)
    assert request.sampling.seed == seed_of(7, 2)


def test_the_seeds_of_choices_differ() -> None:
    seeds = [seed_of(seed, choice) for seed in (0, 1, 2**64 - 1) for choice in range(64)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert seed_of(5, 0) == 5


@pytest.mark.parametrize(("generate", "attempt", "field", "message"), [
    (inference_pb2.GenerateRequest(), {}, "prompt", "the prompt is missing"),
    (_text(""), {}, "text", "has no tokens"),
    (_text("word " * 120), {}, "text", "has 121 tokens, and the model takes 99"),
    (_text("x" * 2_000_000), {}, "text", "more than 100 tokens"),
    (inference_pb2.GenerateRequest(chat=inference_pb2.Chat()), {}, "chat.messages", "at least one message"),
    (inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[3, 49152])), {}, "token_ids.ids", "token 49152 is outside"),
    (inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds()), {}, "token_ids", "no tokens"),
    (inference_pb2.GenerateRequest(resume=inference_pb2.Resume(stream_id="x")), {}, "prompt", "send text, chat or token_ids"),
    (_text(stop=inference_pb2.Stop(max_tokens=0)), {}, "stop.max_tokens", "at least one token"),
    (_text(stop=inference_pb2.Stop(strings=["a", ""])), {}, "stop.strings", "empty"),
    (_text(stop=inference_pb2.Stop(token_ids=[99_999])), {}, "stop.token_ids", "ends at 49151"),
    (_text(num_top_logprobs=21), {}, "num_top_logprobs", "more than 20"),
    (_text(stop=inference_pb2.Stop(max_tokens=2)), {"so_far": link_pb2.GenerationSoFar(token_ids=[1, 2, 3])}, "so_far", "3 tokens are"),
    (_text(), {"so_far": link_pb2.GenerationSoFar(token_ids=[50_000])}, "so_far", "outside the vocabulary"),
])
def test_what_cannot_be_generated_is_refused(generate: Any, attempt: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        _read(generate, **attempt)
    assert caught.value.field == field


def test_heads_that_are_not_for_this_group() -> None:
    with pytest.raises(Unavailable, match="epoch 3, the generation is for epoch 2"):
        read_attempt(_head(_text(), epoch=2), 3)
    for head in (b"\xff", link_pb2.BatchHead(epoch=3, requests=[b""]).SerializeToString(),
                 link_pb2.BatchHead(epoch=3, requests=[b""], generation=link_pb2.GenerationAttempt()).SerializeToString()):
        with pytest.raises(InvalidRequest):
            read_attempt(head, 3)


def test_a_call_to_the_leader_itself() -> None:
    asked = read_asked(_text(revision="abab", request_id="mine", priority=2).SerializeToString(), _SPEC)
    assert (asked.request_id, asked.priority, asked.attempt.num_attempts) == ("mine", 2, 1)
    assert asked.attempt.seed != read_asked(_text().SerializeToString(), _SPEC).attempt.seed
    seeded = _text(sampling=inference_pb2.Sampling(seed=0)).SerializeToString()
    assert read_asked(seeded, _SPEC).attempt.seed == 0
    with pytest.raises(NotFound, match="serves smollm2-chat, not 'other'"):
        read_asked(inference_pb2.GenerateRequest(model="other").SerializeToString(), _SPEC)
    with pytest.raises(NotFound, match="revision"):
        read_asked(_text(revision="cdcd").SerializeToString(), _SPEC)
    with pytest.raises(InvalidRequest, match="ask the gateway"):
        read_asked(_text(num_choices=2).SerializeToString(), _SPEC)
    with pytest.raises(InvalidRequest, match="not a GenerateRequest"):
        read_asked(b"\xff\xff", _SPEC)


def test_finished_says_why_and_what_it_took() -> None:
    wrote = finished_bytes(Finish(FinishReason.STOP_STRING, "END", Usage(10, 5, 8)))
    finished = inference_pb2.GenerateResponse.FromString(wrote).finished
    assert (finished.reason, finished.stop_match) == (inference_pb2.FINISH_REASON_STOP_STRING, "END")
    assert (finished.usage.num_prompt_tokens, finished.usage.num_completion_tokens, finished.usage.num_cached_tokens) == (10, 5, 8)
    assert {reason.value: f"FINISH_REASON_{reason.name}" for reason in FinishReason} == {
        value: name for name, value in inference_pb2.FinishReason.items() if value
    }


_ADVANCES = st.lists(st.tuples(st.lists(st.integers(0, 49151), min_size=1, max_size=3), st.text(max_size=4)), min_size=1, max_size=6)


@given(_ADVANCES, st.booleans())
def test_joined_deltas_say_the_same(parts: list[tuple[list[int], str]], with_logprobs: bool) -> None:
    advances, offset = [], 4
    for ids, text in parts:
        logprobs = tuple(Logprob(-float(id % 7), ((id, -0.5), (1, -2.0))) for id in ids) if with_logprobs else ()
        advances.append(Advance(offset, tuple(ids), text, logprobs))
        offset += len(ids)
    whole = advances[0]
    for advance in advances[1:]:
        whole = joined(whole, advance)
    delta = inference_pb2.GenerateResponse.FromString(delta_bytes(whole)).delta
    apart = [inference_pb2.GenerateResponse.FromString(delta_bytes(advance)).delta for advance in advances]
    assert delta.offset == 4
    assert list(delta.token_ids) == [id for one in apart for id in one.token_ids]
    assert delta.text == "".join(one.text for one in apart)
    assert list(delta.logprobs) == [logprob for one in apart for logprob in one.logprobs]
    assert len(delta.logprobs) == (len(delta.token_ids) if with_logprobs else 0)


def test_a_delta_is_written_in_microseconds() -> None:
    """A relay's cost a token is bounded; generous, for busy machines."""
    advance = Advance(100, (1234,), " hello")
    fastest_s = min(_timed(advance) for _ in range(20))
    assert fastest_s / 1000 < 30e-6


def _timed(advance: Advance) -> float:
    began_s = time.perf_counter()
    for _ in range(1000):
        delta_bytes(advance)
    return time.perf_counter() - began_s

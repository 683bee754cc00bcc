"""Between the wire's messages of a generation and the engine's own: what is asked of a leader, and what it says."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, cast

from google.protobuf.message import DecodeError

from tensorway.errors import InvalidRequest, NotFound, Unavailable
from tensorway.generation import GenerationYaml, SamplingDefaultsYaml
from tensorway.signature import RevisionSpec
from tensorway.v1 import inference_pb2, link_pb2
from tensorway_worker.engines.generation.answer import Advance
from tensorway_worker.engines.generation.requests import Finish, GenerationRequest, Logprob, Sampling, StopRules
from tensorway_worker.engines.generation.text import TextSide

_MAX_TOP_LOGPROBS: Final = 20
#: Seeds drawn here survive a trip through JSON and JavaScript, whose integers end at 53 bits.
_SEED_BITS: Final = 53
_SEED_MASK: Final = (1 << 64) - 1
#: 2^64 / golden ratio, odd: the seeds of the choices of one request are far apart.
_GOLDEN: Final = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class PromptDelta:
    """The prompt, as the first delta of an answer whose caller wants it back."""

    ids: tuple[int, ...]
    text: str

    def to_bytes(self) -> bytes:
        """A serialised GenerateResponse."""
        delta = inference_pb2.Delta(token_ids=self.ids, text=self.text, is_prompt=True)
        return inference_pb2.GenerateResponse(delta=delta).SerializeToString()


@dataclass(frozen=True, slots=True)
class Asked:
    """One choice of a generation, with its text not yet taken apart."""

    request_id: str
    generate: inference_pb2.GenerateRequest
    attempt: link_pb2.GenerationAttempt
    priority: int
    #: The attempt's span; empty where it is not sampled.
    traceparent: str = ""

    def read(
        self, text: TextSide, yaml: GenerationYaml, max_context: int, deadline_s: float
    ) -> tuple[GenerationRequest, PromptDelta | None]:
        """What the engine is to do, and the prompt where it is to be sent. Takes apart the prompt's text (about a millisecond for 1 000
        tokens): not for the loop.

        Args:
            yaml: with the defaults of what the caller leaves open.
            max_context: tokens of prompt and answer together.
            deadline_s: on the monotonic clock.

        Raises InvalidRequest for a prompt that is empty or too long, for token ids outside the vocabulary, and for tokens so far that are
        more than the answer may have.
        """
        generate = self.generate
        prompt_ids = _prompt_ids(generate, text, max_context)
        room = max_context - len(prompt_ids)
        stop = _stop(generate.stop, yaml.defaults, text, room)
        request = GenerationRequest(
            request_id=self.request_id,
            prompt_ids=prompt_ids,
            so_far=_so_far(self.attempt.so_far, stop.max_tokens, text.vocab_size),
            sampling=_sampling(generate.sampling, yaml.defaults, seed_of(self.attempt.seed, self.attempt.choice)),
            stop=stop,
            priority=self.priority,
            deadline_s=deadline_s,
            num_top_logprobs=_num_top_logprobs(generate),
        )
        is_wanted = generate.echo and not self.attempt.so_far.has_prompt
        return request, PromptDelta(prompt_ids, _prompt_text(generate, text, prompt_ids)) if is_wanted else None


def read_attempt(head: bytes, epoch: int) -> Asked:
    """The head of a request frame of an orchestrator (BatchHead). Raises Unavailable where it is for another epoch, InvalidRequest where it
    holds no generation."""
    try:
        batch = link_pb2.BatchHead.FromString(head)
        if batch.epoch != epoch:
            raise Unavailable(f"this group is in epoch {epoch}, the generation is for epoch {batch.epoch}")
        if not batch.HasField("generation") or len(batch.requests) != 1:
            raise InvalidRequest("this group generates tokens: send one request with `generation`", field="generation")
        request = link_pb2.RequestHead.FromString(batch.requests[0])
    except DecodeError as error:
        raise InvalidRequest("the head of a generation is not a BatchHead with a RequestHead", field="head") from error
    if not request.HasField("generate"):
        raise InvalidRequest("the request asks for no generation; set `generate`", field="generate")
    generate = request.generate
    return Asked(
        request.request_id or generate.request_id, generate, batch.generation, request.priority or generate.priority, request.traceparent
    )


def read_asked(message: bytes, spec: RevisionSpec) -> Asked:
    """A GenerateRequest that came to the leader itself. Raises NotFound for another model or revision, InvalidRequest for what only a
    gateway can do."""
    try:
        generate = inference_pb2.GenerateRequest.FromString(message)
    except DecodeError as error:
        raise InvalidRequest("the message is not a GenerateRequest") from error
    if generate.model != spec.model:
        raise NotFound(f"this group serves {spec.model}, not {generate.model!r}", field="model")
    if generate.revision and not spec.revision.startswith(generate.revision):
        raise NotFound(f"this group serves revision {spec.revision}, not {generate.revision}", field="revision")
    if generate.num_choices > 1:
        raise InvalidRequest("num_choices: one group makes one choice at a time; ask the gateway for several", field="num_choices")
    seed = generate.sampling.seed if generate.sampling.HasField("seed") else secrets.randbits(_SEED_BITS)
    return Asked(generate.request_id, generate, link_pb2.GenerationAttempt(seed=seed, num_attempts=1), generate.priority)


def seed_of(seed: int, choice: int) -> int:
    """The seed of one choice, 64 bits unsigned; that of the first is the request's own."""
    return (seed + choice * _GOLDEN) & _SEED_MASK


def delta_bytes(advance: Advance) -> bytes:
    """A serialised GenerateResponse; `choice` and `sequence` are the orchestrator's to fill."""
    delta = inference_pb2.Delta(offset=advance.offset, token_ids=advance.token_ids, text=advance.text)
    if advance.logprobs:
        delta.logprobs.extend(_logprob(one) for one in advance.logprobs)
    return inference_pb2.GenerateResponse(delta=delta).SerializeToString()


def joined(earlier: Advance, later: Advance) -> Advance:
    """Both as one, for a reader that is behind."""
    return Advance(
        earlier.offset, earlier.token_ids + later.token_ids, earlier.text + later.text, earlier.logprobs + later.logprobs
    )


def finished_bytes(finish: Finish) -> bytes:
    """A serialised GenerateResponse; `choice`, `sequence`, `num_attempts` and `group` are the orchestrator's to fill."""
    usage = inference_pb2.Usage(
        num_prompt_tokens=finish.usage.num_prompt_tokens,
        num_completion_tokens=finish.usage.num_completion_tokens,
        num_cached_tokens=finish.usage.num_cached_tokens,
    )
    reason = cast("inference_pb2.FinishReason", int(finish.reason))
    finished = inference_pb2.Finished(reason=reason, stop_match=finish.stop_match, usage=usage)
    return inference_pb2.GenerateResponse(finished=finished).SerializeToString()


def _logprob(logprob: Logprob) -> inference_pb2.TokenLogprob:
    top = [inference_pb2.TopLogprob(token_id=token, logprob=value) for token, value in logprob.top]
    return inference_pb2.TokenLogprob(logprob=logprob.own, top=top)


def _prompt_ids(generate: inference_pb2.GenerateRequest, text: TextSide, max_context: int) -> tuple[int, ...]:
    kind = generate.WhichOneof("prompt")
    if kind == "text":
        ids = text.encode(generate.text, max_tokens=max_context)
    elif kind == "chat":
        messages = [{"role": message.role, "content": message.content} for message in generate.chat.messages]
        ids = text.encode_chat(messages, max_tokens=max_context)
    elif kind == "token_ids":
        ids = tuple(generate.token_ids.ids)
        _check_ids(ids, text.vocab_size, "token_ids.ids")
    else:
        raise InvalidRequest("the prompt is missing; send text, chat or token_ids", field="prompt")
    if not ids:
        raise InvalidRequest(f"{kind}: the prompt has no tokens; send at least one", field=kind)
    if len(ids) >= max_context:
        raise InvalidRequest(
            f"{kind}: the prompt has {len(ids)} tokens, and the model takes {max_context - 1} and one of the answer; shorten it", field=kind
        )
    return ids


def _prompt_text(generate: inference_pb2.GenerateRequest, text: TextSide, ids: Sequence[int]) -> str:
    return generate.text if generate.WhichOneof("prompt") == "text" else text.decode(ids, with_special=True)


def _sampling(sampling: inference_pb2.Sampling, defaults: SamplingDefaultsYaml, seed: int) -> Sampling:
    has = sampling.HasField
    return Sampling(
        temperature=sampling.temperature if has("temperature") else defaults.temperature,
        top_k=sampling.top_k if has("top_k") else defaults.top_k,
        top_p=sampling.top_p if has("top_p") else defaults.top_p,
        min_p=sampling.min_p if has("min_p") else defaults.min_p,
        repetition_penalty=sampling.repetition_penalty if has("repetition_penalty") else defaults.repetition_penalty,
        seed=seed,
    )


def _stop(stop: inference_pb2.Stop, defaults: SamplingDefaultsYaml, text: TextSide, room: int) -> StopRules:
    """
    Args:
        room: tokens that the context holds after the prompt.
    """
    if stop.HasField("max_tokens") and stop.max_tokens == 0:
        raise InvalidRequest("stop.max_tokens is 0; an answer has at least one token", field="stop.max_tokens")
    if not all(stop.strings):
        raise InvalidRequest("stop.strings holds an empty text, which would end every answer; leave it out", field="stop.strings")
    _check_ids(stop.token_ids, text.vocab_size, "stop.token_ids")
    return StopRules(
        max_tokens=min(stop.max_tokens if stop.HasField("max_tokens") else defaults.max_tokens or room, room),
        min_tokens=stop.min_tokens,
        strings=tuple(stop.strings),
        token_ids=frozenset(stop.token_ids),
        eos_ids=frozenset() if stop.ignore_eos else text.eos_ids,
        include_stop=stop.include_stop,
    )


def _so_far(so_far: link_pb2.GenerationSoFar, max_tokens: int, vocab_size: int) -> tuple[int, ...]:
    ids = tuple(so_far.token_ids)
    if len(ids) > max_tokens:
        raise InvalidRequest(f"so_far: {len(ids)} tokens are more than the {max_tokens} that the answer may have", field="so_far")
    _check_ids(ids, vocab_size, "so_far")
    return ids


def _num_top_logprobs(generate: inference_pb2.GenerateRequest) -> int | None:
    if not generate.HasField("num_top_logprobs"):
        return None
    if generate.num_top_logprobs > _MAX_TOP_LOGPROBS:
        wanted = generate.num_top_logprobs
        raise InvalidRequest(f"num_top_logprobs: {wanted} is more than {_MAX_TOP_LOGPROBS}; ask for fewer", field="num_top_logprobs")
    return generate.num_top_logprobs


def _check_ids(ids: Iterable[int], vocab_size: int, field: str) -> None:
    worst = max(ids, default=0)
    if worst >= vocab_size:
        raise InvalidRequest(f"{field}: token {worst} is outside the vocabulary, which ends at {vocab_size - 1}", field=field)

"""Generate, as the Python client calls it: from options to a request, and one stream out of as many connections as it takes."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any, Final, TypedDict

from tensorway.client_attempts import Attempts
from tensorway.client_rota import AsyncChannels, BlockingChannels
from tensorway.errors import InternalError, InvalidRequest, NotFound, TensorwayError
from tensorway.results import ChatMessage, Delta, GenerationEvent, Started, read_event
from tensorway.v1 import inference_pb2

_GENERATE: Final = "/tensorway.v1.InferenceService/Generate"

#: Text as it is, token ids, or messages for the model's chat template.
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]] | Sequence[ChatMessage]


class GenerateOptions(TypedDict, total=False):
    """What `generate` may be told; `tensorway.v1.GenerateRequest` has the meaning and range of each. Unset: the model's own default."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    #: The same seed gives the same answer. Unset: one is drawn, and told in `Started`.
    seed: int
    #: Texts that end the answer; one, or several.
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop: bool
    num_choices: int
    #: Whether the prompt comes back as a first delta.
    echo: bool
    #: Log-probabilities of the drawn tokens and of so many most likely ones.
    num_top_logprobs: int
    priority: int
    revision: str
    request_id: str
    #: Seconds for the whole answer. Unset: the client's own.
    timeout_s: float


_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_STOP: Final = ("max_tokens", "min_tokens", "ignore_eos", "include_stop")
_OWN: Final = ("num_choices", "echo", "num_top_logprobs", "priority", "revision", "request_id")


class Generation:
    """One call: what to send next, and what to make of what came. Touches no network."""

    def __init__(self, model: str, prompt: Prompt, options: GenerateOptions, attempts: Attempts) -> None:
        """Raises InvalidRequest for what cannot be sent."""
        self._message = _write_request(model, prompt, options)
        self._attempts = attempts
        self._request_id = options.get("request_id", "")
        self._stream_id = ""
        self._next_sequence = 0
        #: Why the connection before this one ended.
        self._lost: TensorwayError | None = None

    def begin(self) -> tuple[bytes, float]:
        """The next request to send, and its timeout in seconds."""
        timeout_s = self._attempts.deadline.remaining_s()
        if not self._stream_id:
            return self._message, timeout_s
        position = inference_pb2.Resume(stream_id=self._stream_id, next_sequence=self._next_sequence)
        return inference_pb2.GenerateRequest(request_id=self._request_id, resume=position).SerializeToString(), timeout_s

    def take(self, message: bytes) -> GenerationEvent | None:
        """The event in a message; None for one that came before. Raises InternalError where one is missing."""
        sequence, event = read_event(message)
        if sequence < self._next_sequence:
            return None
        if sequence > self._next_sequence:
            raise InternalError(f"message {sequence} of the stream came where {self._next_sequence} is next")
        self._next_sequence += 1
        if self._lost is not None:
            self._lost = None
            self._attempts.renew()
        if isinstance(event, Started):
            self._stream_id = event.stream_id
        return event

    def pause_s(self, error: TensorwayError) -> float:
        """Seconds to wait before the stream is taken up again. Raises an error where it cannot be."""
        if isinstance(error, NotFound) and self._lost is not None and self._stream_id:
            raise self._lost from error
        pause_s = self._attempts.pause_s(error)
        self._lost = error
        return pause_s


def generate(channel: BlockingChannels, generation: Generation, sleep: Callable[[float], None]) -> Generator[GenerationEvent]:
    """The events of one call, over as many connections as it takes; `sleep` waits between two. Closing it cancels the call."""
    while True:
        stream = channel.server_stream(_GENERATE, *generation.begin())
        try:
            while (message := stream.read()) is not None:
                event = generation.take(message)
                if event is not None:
                    yield event
            return
        except TensorwayError as error:
            pause_s = generation.pause_s(error)
        finally:
            stream.cancel()
        sleep(pause_s)


async def generate_async(channel: AsyncChannels, generation: Generation) -> AsyncGenerator[GenerationEvent]:
    """`generate` for asyncio."""
    while True:
        stream = channel.server_stream(_GENERATE, *generation.begin())
        try:
            while (message := await stream.read()) is not None:
                event = generation.take(message)
                if event is not None:
                    yield event
            return
        except TensorwayError as error:
            pause_s = generation.pause_s(error)
        finally:
            await stream.cancel()
        await asyncio.sleep(pause_s)


def text_of(events: Generator[GenerationEvent], options: GenerateOptions) -> Generator[str]:
    """The pieces of text of one answer, none of them empty. Raises InvalidRequest where several are asked for."""
    _check_one_choice(options)
    return _pieces(events)


def text_of_async(events: AsyncGenerator[GenerationEvent], options: GenerateOptions) -> AsyncGenerator[str]:
    """`text_of` for asyncio."""
    _check_one_choice(options)
    return _pieces_async(events)


def _pieces(events: Generator[GenerationEvent]) -> Generator[str]:
    with closing(events):
        for event in events:
            if isinstance(event, Delta) and event.text:
                yield event.text


async def _pieces_async(events: AsyncGenerator[GenerationEvent]) -> AsyncGenerator[str]:
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Delta) and event.text:
                yield event.text


def _check_one_choice(options: GenerateOptions) -> None:
    if options.get("num_choices", 1) > 1:
        raise InvalidRequest("num_choices: generate_text gives the text of one answer; use generate for several", field="num_choices")


def _write_request(model: str, prompt: Prompt, options: GenerateOptions) -> bytes:
    unknown = sorted(options.keys() - GenerateOptions.__annotations__.keys())
    if unknown:
        raise InvalidRequest(f"{unknown[0]}: is no option of generate", field=unknown[0])
    stop = options.get("stop", ())
    given: Mapping[str, Any] = options
    try:
        request = inference_pb2.GenerateRequest(
            model=model,
            sampling=inference_pb2.Sampling(**{name: given[name] for name in _SAMPLING if name in given}),
            stop=inference_pb2.Stop(
                strings=[stop] if isinstance(stop, str) else stop, token_ids=options.get("stop_token_ids", ()),
                **{name: given[name] for name in _STOP if name in given},
            ),
            **{name: given[name] for name in _OWN if name in given},
        )
        _write_prompt(prompt, request)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"request: {error}", field="request") from error
    return request.SerializeToString()


def _write_prompt(prompt: Prompt, request: inference_pb2.GenerateRequest) -> None:
    """Raises InvalidRequest for what is no prompt, TypeError or ValueError for what does not fit into the message."""
    if isinstance(prompt, str):
        request.text = prompt
        return
    parts = list(prompt)
    if not parts:
        raise InvalidRequest("prompt: is empty; give a text, token ids or messages", field="prompt")
    if not isinstance(parts[0], Mapping | ChatMessage):
        request.token_ids.ids.extend(operator.index(part) for part in parts)  # type: ignore[arg-type]  # refused where it is none
        return
    for index, part in enumerate(parts):
        if isinstance(part, ChatMessage):
            request.chat.messages.add(role=part.role, content=part.content)
        elif isinstance(part, Mapping) and part.keys() == {"role", "content"}:
            request.chat.messages.add(role=part["role"], content=part["content"])
        else:
            raise InvalidRequest(f"prompt[{index}]: a message has `role` and `content`, and nothing else", field=f"prompt[{index}]")

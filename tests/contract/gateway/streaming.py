"""Generations over a scripted orchestrator: what a stream looks like on the link, and a client that reads one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc

from tensorway.generation import GenerationLimits
from tensorway.signature import TensorSpec
from tensorway.tensors import DataType
from tensorway.transport.port import Exchange
from tensorway.v1 import inference_pb2 as pb
from tensorway.v1 import link_pb2
from tests.contract.gateway.scripted import Script, spec

GENERATE = "/tensorway.v1.InferenceService/Generate"
#: A model that generates, as the mesh sees one.
TALKER = replace(
    spec("talker", (TensorSpec("text", DataType.BYTES, ("rows",)),), (TensorSpec("text", DataType.BYTES, ("rows",)),)),
    generation=GenerationLimits(max_sequences=8, max_waiting=8),
)


def started(sequence: int = 0, stream_id: str = "stream-1", seed: int = 77, revision: str = TALKER.revision) -> bytes:
    event = pb.Started(stream_id=stream_id, request_id="r", model="talker", revision=revision, seed=seed)
    return pb.GenerateResponse(sequence=sequence, started=event).SerializeToString()


def delta(sequence: int, token: int, offset: int = 0, choice: int = 0, text: str | None = None) -> bytes:
    event = pb.Delta(choice=choice, offset=offset, token_ids=[token], text=f"{token} " if text is None else text)
    return pb.GenerateResponse(sequence=sequence, delta=event).SerializeToString()


def finished(sequence: int, num_tokens: int, choice: int = 0, num_attempts: int = 1) -> bytes:
    event = pb.Finished(
        choice=choice, reason=pb.FINISH_REASON_LENGTH, usage=pb.Usage(num_prompt_tokens=3, num_completion_tokens=num_tokens),
        num_attempts=num_attempts, group="group-1",
    )
    return pb.GenerateResponse(sequence=sequence, finished=event).SerializeToString()


class Pusher:
    """Sends messages as an orchestrator would, as many as there is credit for; `end` is called when all have been sent."""

    def __init__(self, exchange: Exchange, messages: list[bytes], end: Callable[[], None]) -> None:
        self._exchange = exchange
        self._messages = messages
        self._end = end
        exchange.on_credit(self._push)
        self._push()

    def _push(self) -> None:
        while self._messages and self._exchange.credit:
            self._exchange.push(self._messages.pop(0))
        if not self._messages:
            end, self._end = self._end, lambda: None
            end()


def answer_of(num_tokens: int) -> list[bytes]:
    """`started`, one delta a token, `finished`. Token number i is i."""
    deltas = [delta(1 + token, token, token) for token in range(num_tokens)]
    return [started(), *deltas, finished(1 + num_tokens, num_tokens)]


def talk(num_tokens: int) -> Script:
    """Answers each new generation with so many tokens; goes on with one that another orchestrator began; knows no stream to resume."""

    def script(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        messages = answer_of(num_tokens)
        if head.so_far:
            assert len(head.so_far) == 1
            num_have = len(head.so_far[0].token_ids)
            assert list(head.so_far[0].token_ids) == list(range(num_have))
            assert (head.stream_id, head.seed, head.next_sequence) == ("stream-1", 77, num_have + 1)
            messages = messages[head.next_sequence :]
        Pusher(exchange, messages, lambda: exchange.reply(b"", ()))

    return script


def request(**fields: Any) -> pb.GenerateRequest:
    fields.setdefault("model", "talker")
    if not {"text", "token_ids", "chat", "resume"} & fields.keys():
        fields["text"] = "hello"
    return pb.GenerateRequest(**fields)


class Reading:
    """One Generate call by a plain gRPC client."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def next(self) -> pb.GenerateResponse | None:
        message = await asyncio.wait_for(self.call.read(), 30.0)
        return None if message is grpc.aio.EOF else pb.GenerateResponse.FromString(message)

    async def all(self) -> list[pb.GenerateResponse]:
        found = []
        while (message := await self.next()) is not None:
            found.append(message)
        return found


@asynccontextmanager
async def generating(endpoint: str, message: pb.GenerateRequest, timeout_s: float | None = 30.0, **options: Any) -> AsyncIterator[Reading]:
    """Ends the call, and its connection, at the end."""
    async with grpc.aio.insecure_channel(endpoint, **options) as channel:
        yield Reading(channel.unary_stream(GENERATE)(message.SerializeToString(), timeout=timeout_s))


def tokens_of(messages: list[pb.GenerateResponse], choice: int = 0) -> list[int]:
    """All tokens of one choice, in order."""
    deltas = [message.delta for message in messages if message.HasField("delta")]
    return [token for found in deltas if found.choice == choice for token in found.token_ids]

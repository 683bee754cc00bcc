"""A steady open-loop mix of requests whose right answers are known: sent on time whatever becomes of those before."""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from tensorway.client_generate import GenerateOptions
from tensorway.errors import Status, TensorwayError
from tensorway.results import Delta, Finished, GenerationEvent
from tests.chaos.calls import Calls
from tests.chaos.fleet import CHAT, EMBEDDING, IDENTITY
from tests.chaos.journal import Journal, Record

#: Embeddings are compared to so much: texts that share a step are padded, which moves the last bits.
TOLERANCE: Final = 1e-4
TEXTS: Final = (
    "a river in spring", "two dogs on a beach", "the price of copper fell again", "how do I reset my password?", "rain",
    "The committee will meet on Thursday to go through what is left of the budget.", "one small step", "a cup of tea, please",
)
_CHATS: Final[tuple[tuple[str, GenerateOptions], ...]] = (
    ("Why is the sky blue?", {"temperature": 0.0}),
    ("Tell me about a cat.", {"temperature": 0.8, "seed": 7}),
    ("Count to five.", {"temperature": 0.0}),
)
_NUM_TOKENS: Final = 16
#: Patience with the first answers, which nothing disturbs.
_EXPECTING_S: Final = 90.0


@dataclass(frozen=True, slots=True)
class Mix:
    """Requests per second of each kind, and their timeouts in seconds."""

    identity: float = 25.0
    embedding: float = 4.0
    stream: float = 0.4
    timeout_s: float = 5.0
    stream_timeout_s: float = 30.0


@dataclass(slots=True, eq=False)
class Load:
    """Sends the mix until cancelled. Every request is in the journal, with what is right or wrong about its answer."""

    calls: Calls
    mix: Mix
    seed: int
    journal: Journal
    _embeddings: dict[str, Any] = field(default_factory=dict)
    _answers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _is_over: asyncio.Event = field(default_factory=asyncio.Event)
    _number: int = 0

    async def learn(self) -> None:
        """Asks each text and prompt once, undisturbed: what comes is what must come ever after."""
        if self.mix.embedding:
            for text in TEXTS:
                result = await self.calls.infer(EMBEDDING, {"text": [text]}, f"learn-{len(self._embeddings)}", _EXPECTING_S)
                self._embeddings[text] = result["embedding"][0]
        if self.mix.stream:
            for prompt, options in _CHATS:
                record = Record("learn", "stream", 0.0, 0.0)
                answer = await self._read_stream(record, prompt, {**options, "timeout_s": _EXPECTING_S})
                self._answers[prompt] = tuple(answer)

    async def run(self) -> None:
        """Until `finish`; then waits for what is under way."""
        rates: Mapping[str, float] = {"identity": self.mix.identity, "embedding": self.mix.embedding, "stream": self.mix.stream}
        chance = random.Random(self.seed)
        started_s = time.monotonic()
        due = [(started_s + chance.random() / rate, kind) for kind, rate in rates.items() if rate]
        heapq.heapify(due)
        async with asyncio.TaskGroup() as tasks:
            while not self._is_over.is_set():
                due_s, kind = due[0]
                if not await self._wait_until(due_s):
                    break
                heapq.heapreplace(due, (due_s + 1 / rates[kind], kind))
                tasks.create_task(self._send(kind, chance))

    def finish(self) -> None:
        """Nothing more is sent."""
        self._is_over.set()

    async def _wait_until(self, due_s: float) -> bool:
        """False once the load is to end."""
        try:
            async with asyncio.timeout(max(0.0, due_s - time.monotonic())):
                await self._is_over.wait()
        except TimeoutError:
            return True
        return False

    async def _send(self, kind: str, chance: random.Random) -> None:
        self._number += 1
        timeout_s = self.mix.stream_timeout_s if kind == "stream" else self.mix.timeout_s
        record = self.journal.begin(f"{self.seed}-{self._number}", kind, timeout_s)
        try:
            if kind == "identity":
                await self._ask_identity(record, chance.randbytes(256 * chance.randint(1, 3)), timeout_s)
            elif kind == "embedding":
                await self._ask_embedding(record, chance.choice(TEXTS), timeout_s)
            else:
                await self._ask_stream(record, *chance.choice(_CHATS), timeout_s)
            record.status = Status.OK
        except TensorwayError as error:
            record.status, record.error, record.is_retryable = error.status, str(error), error.is_retryable
        finally:
            record.ended_s = time.monotonic()

    async def _ask_identity(self, record: Record, sent: bytes, timeout_s: float) -> None:
        rows = np.frombuffer(sent, np.float32).reshape(-1, 64)
        result = await self.calls.infer(IDENTITY, {"input": rows}, record.id, timeout_s)
        record.num_answers += 1
        if result.request_id != record.id:
            record.wrong = f"the answer is that of request {result.request_id!r}"
        elif bytes(result.tensors[0].data) != sent:
            record.wrong = f"{len(sent)} bytes did not come back as they went"

    async def _ask_embedding(self, record: Record, text: str, timeout_s: float) -> None:
        result = await self.calls.infer(EMBEDDING, {"text": [text]}, record.id, timeout_s)
        record.num_answers += 1
        found, expected = result["embedding"], self._embeddings[text]
        if result.request_id != record.id:
            record.wrong = f"the answer is that of request {result.request_id!r}"
        elif found.shape != (1, len(expected)):
            record.wrong = f"shape {found.shape}"
        elif (distance := float(np.abs(found[0] - expected).max())) > TOLERANCE:
            record.wrong = f"an element of the embedding is {distance:.2g} off"

    async def _ask_stream(self, record: Record, prompt: str, options: GenerateOptions, timeout_s: float) -> None:
        tokens = await self._read_stream(record, prompt, {**options, "timeout_s": timeout_s, "request_id": record.id})
        expected = self._answers[prompt]
        if not record.wrong and tuple(tokens) != expected:
            record.wrong = f"tokens {tokens} instead of {list(expected)}"

    async def _read_stream(self, record: Record, prompt: str, options: GenerateOptions) -> list[int]:
        """The tokens of one answer; what comes twice, or leaves a gap, is noted."""
        tokens: list[int] = []
        asked: GenerateOptions = {**options, "max_tokens": _NUM_TOKENS, "ignore_eos": True}
        async with aclosing(self.calls.generate(CHAT, [{"role": "user", "content": prompt}], asked)) as events:
            async for event in events:
                note_event(record, tokens, event)
        if record.num_answers == 0:
            record.wrong = f"the stream ended after {len(tokens)} tokens without saying why"
        return tokens


def note_event(record: Record, tokens: list[int], event: GenerationEvent) -> None:
    """Adds an event's tokens to those that came before."""
    if isinstance(event, Finished):
        record.num_answers += 1
    elif isinstance(event, Delta):
        if event.offset < len(tokens):
            record.twice = f"token {event.offset} came again after {len(tokens)}"
        elif event.offset > len(tokens):
            record.wrong = f"token {event.offset} came where {len(tokens)} was next"
        tokens.extend(event.token_ids)
        record.num_tokens += len(event.token_ids)

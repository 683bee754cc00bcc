"""One answer while it is made: tokens in, pieces of text out, and when it ends. Pure but for the tokeniser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tensorway.errors import TensorwayError
from tensorway_worker.engines.generation.requests import Finish, FinishReason, GenerationRequest, Logprob, Usage
from tensorway_worker.engines.generation.sampler import RowToDraw
from tensorway_worker.engines.generation.scheduler import Sequence
from tensorway_worker.engines.generation.text import TextSide, TextStream


@dataclass(frozen=True, slots=True)
class Advance:
    """What one step added to an answer."""

    #: Tokens of the answer before it.
    offset: int
    token_ids: tuple[int, ...]
    text: str
    #: One for each token, where asked for.
    logprobs: tuple[Logprob, ...] = ()


class Listener(Protocol):
    """Who wants an answer. Called in the loop's thread."""

    def advanced(self, advance: Advance) -> None: ...

    def finished(self, finish: Finish) -> None:
        """The last call."""

    def failed(self, error: TensorwayError) -> None:
        """The last call."""


class Answer:
    """The state of one answer beside its sequence."""

    def __init__(self, request: GenerationRequest, text: TextSide, max_context: int, id: int, listener: Listener) -> None:
        self.request = request
        self.listener = listener
        self.sequence = Sequence(id, [*request.prompt_ids, *request.so_far], request.priority)
        self._stop = request.stop
        self._stream = TextStream(text, request.prompt_ids, request.stop)
        self._num_drawn = 0
        self._most = min(request.stop.max_tokens, max_context - len(request.prompt_ids))
        #: Distinct tokens so far; kept only where they are penalised.
        self._seen: set[int] | None = set(self.sequence.ids) if request.sampling.repetition_penalty != 1.0 else None

    def replay(self) -> Finish | None:
        """Goes once more through what the client has; says so where the answer is complete with it."""
        for token in self.request.so_far:
            _, finish = self._step(token)
            if finish is not None:
                return finish
        return None

    def row(self) -> RowToDraw:
        """How the next token is to be drawn."""
        banned = self._stop.eos_ids if self._num_drawn < self._stop.min_tokens else ()
        return self.request.sampling, len(self.sequence.ids), banned, self._seen or (), self.request.num_top_logprobs

    def take(self, token: int, logprob: Logprob | None) -> tuple[Advance, Finish | None]:
        """The next token, just drawn."""
        offset = self._num_drawn
        text, finish = self._step(token)
        if self._seen is not None:
            self._seen.add(token)
        return Advance(offset, (token,), text, () if logprob is None else (logprob,)), finish

    def _step(self, token: int) -> tuple[str, Finish | None]:
        self._num_drawn += 1
        if token in self._stop.eos_ids:
            return self._stream.flush(), self._finish(FinishReason.EOS)
        if token in self._stop.token_ids:
            return self._stream.flush(), self._finish(FinishReason.STOP_TOKEN)
        piece = self._stream.take(token)
        if piece.stop_match is not None:
            return piece.text, self._finish(FinishReason.STOP_STRING, piece.stop_match)
        if self._num_drawn >= self._most:
            return piece.text + self._stream.flush(), self._finish(FinishReason.LENGTH)
        return piece.text, None

    def _finish(self, reason: FinishReason, stop_match: str = "") -> Finish:
        usage = Usage(len(self.request.prompt_ids), self._num_drawn, max(0, min(self.sequence.num_cached, len(self.request.prompt_ids))))
        return Finish(reason, stop_match, usage)

"""What a generation is asked for, and what its steps give: plain data between the leader's wire and the engine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn; protos/tensorway/v1/inference.proto has the meaning of each."""

    #: 0: the most likely token.
    temperature: float = 0.0
    #: 0: all.
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    #: 64 bits, unsigned; the choice is mixed into it already, so that each choice draws its own.
    seed: int = 0


@dataclass(frozen=True, slots=True)
class StopRules:
    """When an answer ends."""

    max_tokens: int
    min_tokens: int = 0
    strings: tuple[str, ...] = ()
    token_ids: frozenset[int] = frozenset()
    #: The model's own end-of-sequence tokens; empty where the caller wants them ignored.
    eos_ids: frozenset[int] = frozenset()
    #: Whether the stop string is part of the text.
    include_stop: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One choice of one generation."""

    request_id: str
    #: At least one.
    prompt_ids: tuple[int, ...]
    #: Tokens of the answer that the client has already (from a group that was lost).
    so_far: tuple[int, ...]
    sampling: Sampling
    stop: StopRules
    #: Higher goes first.
    priority: int
    #: On the monotonic clock.
    deadline_s: float
    #: None: no log-probabilities; else those of the chosen token and of so many most likely ones.
    num_top_logprobs: int | None = None


class FinishReason(IntEnum):
    """Numbers as in tensorway.v1.FinishReason."""

    EOS = 1
    STOP_STRING = 2
    STOP_TOKEN = 3
    LENGTH = 4


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of one drawn token: its own natural log-probability, and (token id, log-probability) of the most likely ones, most likely first."""

    own: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a choice took."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Finish:
    """How a choice ended."""

    reason: FinishReason
    stop_match: str
    usage: Usage

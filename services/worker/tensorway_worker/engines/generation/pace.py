"""How many tokens of prompts a step may take so that running answers hardly notice. Pure.

A step is thought to take a time of its own, and a time for each of its tokens, whether they continue an answer or belong to a prompt (the
matrix products, which are nearly all of a step, know no difference). Both are learnt from every step, the newest counting most: weighted
least squares over (tokens, seconds) with weights that fade.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: A step with pieces of prompts may take this many times what its answers alone would take.
STRETCH: Final = 2.0
#: Prompts get on by at least so many tokens a step.
MIN_PREFILL_TOKENS: Final = 8
#: What a measurement counts once the next has come.
_FADING: Final = 0.97
#: A line needs steps that differ in size: squared deviation of the tokens, weighted.
_MIN_SPREAD: Final = 4.0


@dataclass(slots=True)
class Pace:
    """Learns from every step."""

    _weight: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0
    _tokens_squared: float = 0.0
    _tokens_seconds: float = 0.0

    def observe(self, num_tokens: int, took_s: float) -> None:
        """One step of so many tokens."""
        self._weight = self._weight * _FADING + 1.0
        self._tokens = self._tokens * _FADING + num_tokens
        self._seconds = self._seconds * _FADING + took_s
        self._tokens_squared = self._tokens_squared * _FADING + num_tokens * num_tokens
        self._tokens_seconds = self._tokens_seconds * _FADING + num_tokens * took_s

    def line(self) -> tuple[float, float] | None:
        """(seconds of a step without tokens, seconds of each token); None while too little is known."""
        if not self._weight:
            return None
        mean_tokens, mean_s = self._tokens / self._weight, self._seconds / self._weight
        spread = self._tokens_squared - self._weight * mean_tokens * mean_tokens
        if spread < _MIN_SPREAD:
            return None
        token_s = (self._tokens_seconds - self._weight * mean_tokens * mean_s) / spread
        # No step is faster for having more tokens, and none takes less than nothing.
        token_s = min(max(token_s, 0.0), mean_s / mean_tokens)
        return mean_s - token_s * mean_tokens, token_s

    def prefill_tokens(self, num_decoding: int) -> int | None:
        """Most tokens of prompts in a step in which so many answers advance; None where nothing says how many are too many."""
        line = self.line()
        if line is None or not line[1]:
            return None
        own_s, token_s = line
        return max(MIN_PREFILL_TOKENS, int((STRETCH - 1.0) * (own_s / token_s + num_decoding)))

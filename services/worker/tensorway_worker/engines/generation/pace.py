"""How many tokens of prompts a step may take so that running answers hardly notice. Pure.

What a step takes is thought to be what its answers take, learnt from steps without prompts, and a time for each token of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: A step with pieces of prompts may take this many times what its answers alone take.
STRETCH: Final = 2.0
#: Prompts get on by at least so many tokens a step.
MIN_PREFILL_TOKENS: Final = 8
#: Weight of the newest measurement.
_NEWEST: Final = 0.2


@dataclass(slots=True)
class Pace:
    """Learns from every step."""

    #: Of a step in which answers advance and nothing else, seconds; 0: unknown.
    decode_s: float = 0.0
    #: Of one token of a prompt, seconds; 0: unknown.
    prefill_token_s: float = 0.0

    def observe(self, num_decoding: int, num_prefilling_tokens: int, took_s: float) -> None:
        """One step of so many answers and tokens of prompts."""
        if num_decoding and not num_prefilling_tokens:
            self.decode_s = _learnt(self.decode_s, took_s)
        elif num_prefilling_tokens >= MIN_PREFILL_TOKENS:
            own_s = took_s - (self.decode_s if num_decoding else 0.0)
            self.prefill_token_s = _learnt(self.prefill_token_s, max(0.0, own_s) / num_prefilling_tokens)

    def prefill_tokens(self) -> int | None:
        """Most tokens of prompts beside running answers; None while too little is known."""
        if not self.decode_s or not self.prefill_token_s:
            return None
        return max(MIN_PREFILL_TOKENS, int((STRETCH - 1.0) * self.decode_s / self.prefill_token_s))


def _learnt(known: float, newest: float) -> float:
    return newest if not known else known + _NEWEST * (newest - known)

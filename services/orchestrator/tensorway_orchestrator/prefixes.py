"""Which group continues a prompt: the one that has least to do for it. Pure.

A group keeps the keys and values of prompts that it has seen, so the beginning that a prompt shares with one of them costs it nothing. What
a group has seen is known from what it was sent: chained hashes of the prompt's blocks, the least recently used forgotten first. Where the
groups' loads have drifted far apart, load alone decides (the guard of SGLang's cache-aware router).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

#: Bytes of prompt in a block: some sixty tokens of text.
BLOCK_BYTES: Final = 256
#: Blocks of a prompt that are looked at; beyond them (64 KiB) the choice costs no more.
MAX_BLOCKS: Final = 256
#: Blocks remembered of a group, about a megabyte of prompts.
_MAX_REMEMBERED: Final = 4096
#: Blocks that one running choice weighs.
_CHOICE_WEIGHT: Final = 4
_MAX_LOAD_GAP: Final = 64
_MAX_LOAD_RATIO: Final = 1.5


def hash_blocks(prompt: bytes) -> tuple[bytes, ...]:
    """Chained hashes of the whole blocks at the beginning of a prompt: equal where all up to there is equal."""
    hashes: list[bytes] = []
    link = b""
    for start in range(0, min(len(prompt), BLOCK_BYTES * MAX_BLOCKS) - BLOCK_BYTES + 1, BLOCK_BYTES):
        link = blake2b(link + prompt[start : start + BLOCK_BYTES], digest_size=8).digest()
        hashes.append(link)
    return tuple(hashes)


@dataclass(slots=True)
class SeenPrefixes:
    """What one group has seen."""

    max_blocks: int = _MAX_REMEMBERED
    _seen: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def add(self, blocks: Sequence[bytes]) -> None:
        """A prompt was sent there."""
        seen = self._seen
        # The first block last: a beginning outlives what follows it, and is found by halving.
        for block in reversed(blocks):
            seen[block] = None
            seen.move_to_end(block)
        while len(seen) > self.max_blocks:
            seen.popitem(last=False)

    def num_held(self, blocks: Sequence[bytes]) -> int:
        """Blocks at the beginning of a prompt that the group has seen."""
        return bisect_left(blocks, True, key=lambda block: block not in self._seen)


@dataclass(frozen=True, slots=True)
class Place:
    """A group with room, as the chooser sees it."""

    id: str
    #: Choices that it has.
    num_running: int
    #: Blocks of the prompt that it need not work out.
    num_held: int


def choose_place(places: Sequence[Place], num_blocks: int, avoid: Sequence[str], pick: Callable[[int], int]) -> Place | None:
    """The cheapest place, or None. Groups in `avoid` are taken only where there is no other; `pick(n)` returns a random integer below n."""
    preferred = [place for place in places if place.id not in avoid] or places
    if not preferred:
        return None
    least, most = min(place.num_running for place in preferred), max(place.num_running for place in preferred)
    is_by_load = most - least > _MAX_LOAD_GAP and most > _MAX_LOAD_RATIO * least

    def cost(place: Place) -> tuple[int, int, int]:
        blocks = 0 if is_by_load else num_blocks - place.num_held + _CHOICE_WEIGHT * place.num_running
        return blocks, place.num_running, pick(1 << 16)

    return min(preferred, key=cost)

"""The blocks of the KV cache: who holds which, and what the free ones still contain. Pure: counts integers, touches no memory.

A block holds the keys and values of `block_tokens` consecutive tokens. A full block whose tokens and all before them are known is
published: a later sequence that begins with the same tokens holds it, too, and need not compute them. Blocks that nobody holds stay
published until they are needed for something else, the one that was let go the longest ago first (the idea of paged attention and of its
prefix caching: Kwon et al., SOSP 2023). What is published is a tree of exact token ids, so no two prefixes can be taken for one another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

#: Node of the empty prefix.
ROOT = 0
#: (node of all blocks before, the block's tokens).
Key = tuple[int, tuple[int, ...]]


@dataclass(slots=True)
class _Block:
    num_holders: int = 0
    #: Under which it is published; None: it is not.
    key: Key | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """The longest published prefix of some tokens."""

    blocks: tuple[int, ...]
    #: Node of each block's prefix, this block included.
    nodes: tuple[int, ...]
    #: The block after it is being computed by a sequence that runs: waiting for it saves the work.
    is_coming: bool


class BlockPool:
    """All blocks of a group; every rank of the group uses the same numbers for its own layers."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._blocks = [_Block() for _ in range(num_blocks)]
        #: Held by nobody, the longest free first.
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))
        #: Key -> (block, node).
        self._published: dict[Key, tuple[int, int]] = {}
        #: Key -> number of sequences that compute it.
        self._coming: dict[Key, int] = {}
        self._last_node = ROOT

    @property
    def num_free(self) -> int:
        """Blocks held by nobody, published ones included."""
        return len(self._free)

    @property
    def num_published(self) -> int:
        return len(self._published)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_tokens)

    def match(self, ids: Sequence[int]) -> Match:
        """What is published of `ids`; at least the last token is always left to be computed, because its logits are wanted."""
        blocks: list[int] = []
        nodes: list[int] = []
        node = ROOT
        for begin in range(0, (len(ids) - 1) // self.block_tokens * self.block_tokens, self.block_tokens):
            key = (node, tuple(ids[begin : begin + self.block_tokens]))
            found = self._published.get(key)
            if found is None:
                return Match(tuple(blocks), tuple(nodes), key in self._coming)
            blocks.append(found[0])
            node = found[1]
            nodes.append(node)
        return Match(tuple(blocks), tuple(nodes), False)

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` are held by nobody: holding them takes as many free ones."""
        return sum(1 for block in blocks if not self._blocks[block].num_holders)

    def hold(self, blocks: Sequence[int]) -> None:
        """One more holder for published blocks."""
        for block in blocks:
            self._blocks[block].num_holders += 1
            self._free.pop(block, None)

    def take(self, count: int) -> list[int] | None:
        """So many blocks with unknown content, or None where fewer are free."""
        if count > len(self._free):
            return None
        taken: list[int] = []
        for _ in range(count):
            number, _ = self._free.popitem(last=False)
            block = self._blocks[number]
            if block.key is not None:
                del self._published[block.key]
                block.key = None
            block.num_holders = 1
            taken.append(number)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less. The last blocks of a sequence are the first to be needed for something else: longer prefixes are rarer."""
        for number in reversed(blocks):
            block = self._blocks[number]
            block.num_holders -= 1
            if not block.num_holders:
                self._free[number] = None
                if block.key is None:
                    self._free.move_to_end(number, last=False)

    def announce(self, parent: int, ids: Sequence[int]) -> Key | None:
        """Says that the block of `ids` after `parent` is being computed; returns what `withdraw` takes. None for less than a block."""
        if len(ids) < self.block_tokens:
            return None
        key = (parent, tuple(ids[: self.block_tokens]))
        self._coming[key] = self._coming.get(key, 0) + 1
        return key

    def withdraw(self, key: Key | None) -> None:
        """Takes an announcement back."""
        if key is not None:
            self._coming[key] -= 1
            if not self._coming[key]:
                del self._coming[key]

    def publish(self, parent: int, ids: Sequence[int], number: int) -> int:
        """`number` holds the computed `ids` (one block of them) after the prefix `parent`; returns the node of the longer prefix."""
        key = (parent, tuple(ids))
        found = self._published.get(key)
        if found is not None:
            return found[1]
        self._last_node += 1
        self._published[key] = (number, self._last_node)
        self._blocks[number].key = key
        return self._last_node

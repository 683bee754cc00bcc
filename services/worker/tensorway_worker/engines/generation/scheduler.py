"""Which tokens are computed in the next step. Pure: integers in, integers out; the clock, the model and the threads are elsewhere.

Every step first gives one token to each running answer, then what is left of its tokens to pieces of prompts (chunked prefill: Agrawal
et al., OSDI 2024). Answers join and leave between any two steps (Yu et al., OSDI 2022). An answer that finds no block has the one that
came last give its blocks up; that one waits and is computed again later, from what is still published of it.

With several windows (pipeline stages) each step takes its share of the running answers, so that as many steps are on their way as there
are stages; no answer is in two of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from tensorway_worker.engines.generation.blocks import ROOT, BlockPool, Key

#: While answers run, this share of the blocks stays free for them when a new one asks to join.
_RESERVED_SHARE: Final = 0.01


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step, and what all answers together, may take."""

    max_sequences: int
    step_tokens: int
    #: Steps on their way at once.
    windows: int = 1


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer, with its prompt."""

    id: int
    #: Prompt and answer.
    ids: list[int]
    #: Higher goes first.
    priority: int = 0
    #: Of arrival; kept when it has to wait again.
    order: int = 0
    #: Tokens whose keys and values are in `blocks`.
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    #: Nodes of its published blocks.
    nodes: list[int] = field(default_factory=list)
    #: Tokens that it found published when it first joined; -1: it has not yet.
    num_cached: int = -1
    is_in_flight: bool = False
    #: Nobody wants it any more.
    is_dropped: bool = False
    #: Times that it had to give its blocks up.
    num_preemptions: int = 0
    #: Of the block that it computes now.
    announced: Key | None = None

    @property
    def num_left(self) -> int:
        """Tokens to be computed before the next one can be drawn."""
        return len(self.ids) - self.num_computed


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence's part in a step: tokens [start, start + count)."""

    sequence: Sequence
    start: int
    count: int

    @property
    def draws(self) -> bool:
        """Whether the next token is drawn after it."""
        return self.start + self.count == len(self.sequence.ids)


@dataclass(frozen=True, slots=True)
class Step:
    """One step: the rows that each compute one token of an answer, then those that compute pieces of prompts."""

    rows: tuple[Row, ...]
    num_decoding: int
    num_tokens: int

    @property
    def num_prefilling_tokens(self) -> int:
        return self.num_tokens - self.num_decoding


class Scheduler:
    """All sequences of a group, running and waiting."""

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self._pool = pool
        self._limits = limits
        self._running: list[Sequence] = []
        self._waiting: list[tuple[int, int, Sequence]] = []
        self._orders = count()
        self._num_waiting = 0
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def num_decoding(self) -> int:
        """Answers that would advance in the next step."""
        decoding = sum(1 for one in self._running if one.num_left == 1)
        return -(-decoding // self._limits.windows)

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def capacity_tokens(self) -> int:
        """Tokens that a sequence can have if it is alone."""
        return self._pool.num_blocks * self._pool.block_tokens

    def add(self, sequence: Sequence) -> None:
        """One more that waits. Its tokens must be fewer than `capacity_tokens`."""
        if len(sequence.ids) >= self.capacity_tokens:
            raise ValueError(f"{len(sequence.ids)} tokens never fit into {self.capacity_tokens}")
        sequence.order = next(self._orders)
        self._wait(sequence)

    def drop(self, sequence: Sequence) -> None:
        """It is wanted no more, or has ended. One that is in a step on its way gives its blocks up when that comes back."""
        if sequence.is_dropped:
            return
        sequence.is_dropped = True
        if sequence in self._running:
            if not sequence.is_in_flight:
                self._leave(sequence)
        else:
            self._num_waiting -= 1

    def next(self, prefill_tokens: int | None = None) -> Step | None:
        """The next step; None where nothing can be computed now.

        Args:
            prefill_tokens: most tokens of prompts in a step in which answers advance, too; None: what `step_tokens` leaves.
        """
        rows = self._decoding()
        num_decoding = len(rows)
        budget = self._limits.step_tokens
        if num_decoding:
            # However many answers run, prompts get on a little.
            budget = max(budget - num_decoding, budget // 8, 1)
            budget = budget if prefill_tokens is None else min(budget, max(1, prefill_tokens))
        self._prefilling(rows, budget)
        if not rows:
            return None
        for row in rows:
            row.sequence.is_in_flight = True
        return Step(tuple(rows), num_decoding, sum(row.count for row in rows))

    def back(self, step: Step) -> None:
        """The step has been computed: what its rows hold now is known."""
        for row in step.rows:
            sequence = row.sequence
            sequence.is_in_flight = False
            sequence.num_computed = row.start + row.count
            self._publish(sequence)
            if sequence.is_dropped:
                self._leave(sequence)

    def lost(self, step: Step) -> None:
        """The step failed: nothing is known of what its rows hold."""
        for row in step.rows:
            row.sequence.is_in_flight = False
            if row.sequence.is_dropped:
                self._leave(row.sequence)

    def _decoding(self) -> list[Row]:
        decoding = [one for one in self._running if one.num_left == 1]
        ready = [one for one in decoding if not one.is_in_flight]
        if self._limits.windows > 1:
            ready = ready[: -(-len(decoding) // self._limits.windows)]
        rows: list[Row] = []
        for sequence in ready:
            # It may have given its blocks up to one before it.
            if sequence.blocks and self._grow(sequence, sequence.num_computed + 1, rows):
                rows.append(Row(sequence, sequence.num_computed, 1))
        return rows

    def _prefilling(self, rows: list[Row], budget: int) -> None:
        """Pieces of prompts, so that a short one does not wait for a long one to end, nor a long one for ever: half of the tokens are the
        oldest prompt's, the other half goes to the shortest first, then to those that wait, and what they leave to the oldest again."""
        begun = [one for one in self._running if one.num_left > 1 and not one.is_in_flight]
        oldest = begun[:1]
        left = budget - budget // 2 if oldest else budget
        kept = budget - left
        for sequence in sorted(begun[1:], key=lambda one: one.num_left):
            left -= self._prefill(sequence, rows, left)
        left = self._join(rows, left)
        for sequence in oldest:
            self._prefill(sequence, rows, kept + left)

    def _prefill(self, sequence: Sequence, rows: list[Row], budget: int) -> int:
        size = min(budget, sequence.num_left)
        # It may have given its blocks up to another.
        if size < 1 or sequence not in self._running or not self._grow(sequence, sequence.num_computed + size, rows):
            return 0
        rows.append(Row(sequence, sequence.num_computed, size))
        return size

    def _join(self, rows: list[Row], budget: int) -> int:
        """Lets those that wait join, as long as there are places, blocks and tokens; returns the tokens that are left."""
        passed_over: list[Sequence] = []
        while budget > 0 and self._waiting and len(self._running) < self._limits.max_sequences:
            _, _, sequence = self._waiting[0]
            if sequence.is_dropped:
                heapq.heappop(self._waiting)
                continue
            match = self._pool.match(sequence.ids)
            if match.is_coming:
                heapq.heappop(self._waiting)
                passed_over.append(sequence)
                continue
            wanted = self._pool.blocks_for(len(sequence.ids) + 1) - len(match.blocks)
            reserved = int(self._pool.num_blocks * _RESERVED_SHARE) + 1 if self._running else 0
            if wanted + self._pool.num_idle(match.blocks) + reserved > self._pool.num_free:
                break
            heapq.heappop(self._waiting)
            self._num_waiting -= 1
            self._pool.hold(match.blocks)
            sequence.blocks, sequence.nodes = list(match.blocks), list(match.nodes)
            sequence.num_computed = len(match.blocks) * self._pool.block_tokens
            if sequence.num_cached < 0:
                sequence.num_cached = sequence.num_computed
            self._running.append(sequence)
            self._announce(sequence)
            budget -= self._prefill(sequence, rows, budget)
        for sequence in passed_over:
            heapq.heappush(self._waiting, (-sequence.priority, sequence.order, sequence))
        return budget

    def _grow(self, sequence: Sequence, num_tokens: int, rows: Iterable[Row]) -> bool:
        """Gives it the blocks for so many tokens, others' if need be; False where it had to give up its own instead."""
        missing = self._pool.blocks_for(num_tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        busy = {id(row.sequence) for row in rows}
        while (taken := self._pool.take(missing)) is None:
            others = [one for one in self._running if not one.is_in_flight and id(one) not in busy]
            victim = min(others, key=lambda one: (one.priority, -one.order))
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks.extend(taken)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._give_up(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (-sequence.priority, sequence.order, sequence))
        self._num_waiting += 1

    def _leave(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._give_up(sequence)

    def _give_up(self, sequence: Sequence) -> None:
        self._pool.withdraw(sequence.announced)
        sequence.announced = None
        self._pool.release(sequence.blocks)
        sequence.blocks, sequence.nodes, sequence.num_computed = [], [], 0

    def _publish(self, sequence: Sequence) -> None:
        size = self._pool.block_tokens
        while (len(sequence.nodes) + 1) * size <= sequence.num_computed:
            index = len(sequence.nodes)
            parent = sequence.nodes[-1] if sequence.nodes else ROOT
            sequence.nodes.append(self._pool.publish(parent, sequence.ids[index * size : (index + 1) * size], sequence.blocks[index]))
        self._announce(sequence)

    def _announce(self, sequence: Sequence) -> None:
        """Of a prompt that is being computed, the next block: another with the same prompt waits for it."""
        self._pool.withdraw(sequence.announced)
        sequence.announced = None
        if sequence.num_left > 1:
            begin = len(sequence.nodes) * self._pool.block_tokens
            parent = sequence.nodes[-1] if sequence.nodes else ROOT
            sequence.announced = self._pool.announce(parent, sequence.ids[begin : begin + self._pool.block_tokens])

"""The scheduler of generations, with integers: a cache that is simulated place by place tells whether every token saw its own past."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorway_worker.engines.generation.blocks import BlockPool
from tensorway_worker.engines.generation.scheduler import Limits, Scheduler, Sequence, Step

BLOCK = 4
EOS = 0


def next_token(ids: list[int]) -> int:
    """A "model": the next token depends on all before it."""
    return hash(tuple(ids)) % 7


@dataclass
class World:
    """A scheduler, and what is in each place of its cache."""

    num_blocks: int
    limits: Limits
    places: dict[int, tuple[int, ...]] = field(default_factory=dict)
    sequences: list[Sequence] = field(default_factory=list)
    most: dict[int, int] = field(default_factory=dict)
    num_computed: int = 0

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, BLOCK)
        self.scheduler = Scheduler(self.pool, self.limits)

    def add(self, prompt: list[int], max_tokens: int, priority: int = 0) -> Sequence:
        sequence = Sequence(len(self.sequences), list(prompt), priority)
        self.sequences.append(sequence)
        self.most[sequence.id] = len(prompt) + max_tokens
        self.scheduler.add(sequence)
        return sequence

    def compute(self, step: Step) -> None:
        """What the ranks do: write each token's place, and look at all places before it."""
        held: dict[int, int] = {}
        for row in step.rows:
            sequence = row.sequence
            assert row.count >= 1
            assert len(sequence.blocks) * BLOCK >= row.start + row.count
            for position in range(row.start, row.start + row.count):
                place = sequence.blocks[position // BLOCK] * BLOCK + position % BLOCK
                assert held.setdefault(place, sequence.id) == sequence.id, "two rows write one place"
                self.places[place] = tuple(sequence.ids[: position + 1])
                self.num_computed += 1
        for row in step.rows:
            sequence = row.sequence
            for position in range(row.start + row.count):
                place = sequence.blocks[position // BLOCK] * BLOCK + position % BLOCK
                assert self.places[place] == tuple(sequence.ids[: position + 1]), "a token sees another's past"

    def back(self, step: Step) -> None:
        drawing = [row.sequence for row in step.rows if row.draws]
        self.scheduler.back(step)
        for sequence in drawing:
            if sequence.is_dropped:
                continue
            sequence.ids.append(next_token(sequence.ids))
            if len(sequence.ids) >= self.most[sequence.id]:
                self.scheduler.drop(sequence)

    def run(self, prefill_tokens: int | None = None) -> None:
        """Until nothing is left, with as many steps on their way as there are windows."""
        on_their_way: list[Step] = []
        for _ in range(20_000):
            while len(on_their_way) < self.limits.windows:
                step = self.scheduler.next(prefill_tokens)
                if step is None:
                    break
                in_others = {row.sequence.id for other in on_their_way for row in other.rows}
                assert not in_others & {row.sequence.id for row in step.rows}
                assert step.num_tokens <= max(self.limits.step_tokens, step.num_decoding + self.limits.step_tokens)
                on_their_way.append(step)
            if not on_their_way:
                break
            step = on_their_way.pop(0)
            self.compute(step)
            self.back(step)
        assert not on_their_way
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.pool.num_free == self.num_blocks


def alone(prompt: list[int], max_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(next_token(ids))
    return ids


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 12), st.integers(-1, 1)), min_size=1, max_size=12
    ),
    num_blocks=st.integers(11, 40), max_sequences=st.integers(1, 6), step_tokens=st.integers(1, 16), windows=st.integers(1, 3),
    prefill=st.one_of(st.none(), st.integers(1, 8)),
)
def test_every_answer_is_what_it_is_alone(
    prompts: list[tuple[list[int], int, int]], num_blocks: int, max_sequences: int, step_tokens: int, windows: int, prefill: int | None
) -> None:
    world = World(num_blocks, Limits(max_sequences, step_tokens, windows))
    for prompt, max_tokens, priority in prompts:
        world.add(prompt, max_tokens, priority)
    world.run(prefill)
    for sequence, (prompt, max_tokens, _) in zip(world.sequences, prompts, strict=True):
        assert sequence.ids == alone(prompt, max_tokens)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_dropping_any_at_any_time_leaves_nothing_behind(seed: int) -> None:
    chance = random.Random(seed)
    world = World(24, Limits(4, 8, 2))
    on_their_way: list[Step] = []
    for _ in range(300):
        if chance.random() < 0.2 and len(world.sequences) < 25:
            world.add([chance.randrange(2) for _ in range(chance.randrange(1, 25))], chance.randrange(1, 20))
        if world.sequences and chance.random() < 0.1:
            world.scheduler.drop(chance.choice(world.sequences))
        if len(on_their_way) < 2 and (step := world.scheduler.next()) is not None:
            on_their_way.append(step)
        if on_their_way and chance.random() < 0.6:
            step = on_their_way.pop(0)
            if chance.random() < 0.1:
                world.scheduler.lost(step)
                for row in step.rows:
                    world.scheduler.drop(row.sequence)
            else:
                world.compute(step)
                world.back(step)
    while on_their_way:
        world.scheduler.lost(on_their_way.pop(0))
    for sequence in world.sequences:
        world.scheduler.drop(sequence)
    assert world.scheduler.next() is None
    assert world.scheduler.num_running == world.scheduler.num_waiting == 0
    assert world.pool.num_free == 24


def test_a_prefix_that_is_there_is_not_computed_again() -> None:
    world = World(64, Limits(8, 64))
    shared = [1] * 16
    first = world.add([*shared, 2, 3], 2)
    world.run()
    before = world.num_computed
    second = world.add([*shared, 4, 5, 6], 2)
    world.run()
    assert (first.num_cached, second.num_cached) == (0, 16)
    assert world.num_computed - before == 3 + 1


def test_a_prompt_that_is_being_computed_is_waited_for() -> None:
    world = World(64, Limits(8, 8))
    sequences = [world.add([5] * 33, 1) for _ in range(4)]
    world.run()
    assert [one.num_cached for one in sequences] == [0, 32, 32, 32]
    assert world.num_computed == 33 + 3


def test_long_prompts_leave_every_step_to_those_who_answer() -> None:
    world = World(200, Limits(8, 16))
    short = world.add([1, 2], 40)
    step = world.scheduler.next()
    assert step is not None
    world.compute(step)
    world.back(step)
    world.add([3] * 200, 1)
    while not short.is_dropped:
        before = len(short.ids)
        step = world.scheduler.next(5)
        assert step is not None
        assert step.num_prefilling_tokens <= 5
        world.compute(step)
        world.back(step)
        assert len(short.ids) == before + 1
    world.run()


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    world = World(400, Limits(8, 16))
    long = world.add([3] * 1000, 1)
    for _ in range(3):
        step = world.scheduler.next()
        assert step is not None
        world.compute(step)
        world.back(step)
    short, middle = world.add([4] * 8, 1), world.add([5] * 100, 1)
    order: list[Sequence] = []
    while len(order) < 3:
        before = long.num_computed
        step = world.scheduler.next()
        assert step is not None
        world.compute(step)
        world.back(step)
        assert long.is_dropped or long.num_computed >= before + 8, "nor does the long one stand still"
        order += [one for one in (short, middle, long) if one.is_dropped and one not in order]
    assert order == [short, middle, long]


def test_answers_that_fill_every_step_leave_something_to_prompts() -> None:
    world = World(200, Limits(64, 8))
    for number in range(32):
        world.add([number], 30)
    late = world.add([7] * 40, 1)
    for _ in range(200):
        step = world.scheduler.next()
        if step is None:
            break
        world.compute(step)
        world.back(step)
        if late.is_dropped:
            return
    pytest.fail("the prompt never got its turn")


def test_who_came_last_gives_way_and_goes_on_later() -> None:
    world = World(8, Limits(8, 32))
    first, second = world.add([1] * 9, 12), world.add([2] * 9, 12)
    world.run()
    assert first.num_preemptions == 0
    assert second.num_preemptions > 0
    assert second.ids == alone([2] * 9, 12)


def test_higher_priority_joins_first() -> None:
    world = World(64, Limits(1, 32))
    low, high = world.add([1], 1, priority=0), world.add([2], 1, priority=5)
    step = world.scheduler.next()
    assert step is not None
    assert [row.sequence for row in step.rows] == [high]
    assert not low.blocks


def test_windows_share_the_answers() -> None:
    world = World(64, Limits(8, 64, windows=2))
    for number in range(6):
        world.add([number], 5)
    step = world.scheduler.next()
    assert step is not None
    world.compute(step)
    world.back(step)
    one, two = world.scheduler.next(), world.scheduler.next()
    assert one is not None
    assert two is not None
    assert (one.num_decoding, two.num_decoding) == (3, 3)
    assert world.scheduler.next() is None


def test_what_never_fits_is_refused() -> None:
    world = World(4, Limits(8, 64))
    with pytest.raises(ValueError, match="16 tokens never fit into 16"):
        world.add([1] * 16, 1)


def test_the_longest_unused_prefix_makes_room_first() -> None:
    pool = BlockPool(4, 2)
    taken = pool.take(4)
    assert taken is not None
    nodes = [pool.publish(0, (number, number), block) for number, block in enumerate(taken)]
    assert len(set(nodes)) == 4
    for block in taken:
        pool.release([block])
    again = pool.match([0, 0, 9])
    pool.hold(again.blocks)
    pool.release(again.blocks)
    pool.take(3)
    assert pool.match([0, 0, 9]).blocks == again.blocks
    assert not pool.match([1, 1, 9]).blocks

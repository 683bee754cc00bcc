"""Runs scenarios one after another in a mesh under load, and judges each by what its clients saw."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.chaos.calls import Calls
from tests.chaos.checker import Verdict, Window, judge
from tests.chaos.journal import Journal
from tests.chaos.leaks import Holdings, strays
from tests.chaos.load import Load, Mix
from tests.chaos.scenarios import Scenario, obstacle
from tests.chaos.world import Shape, World, open_world

#: Patience with a mesh that starts.
START_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How long load is watched before a fault and after it, seconds."""

    before_s: float = 3.0
    after_s: float = 4.0


@dataclass(slots=True)
class Outcome:
    """What came of one scenario."""

    scenario: Scenario
    registry: str
    #: Whom the fault struck.
    struck: str = ""
    #: Why it was not run; empty where it was.
    skipped: str = ""
    verdict: Verdict = field(default_factory=Verdict)
    #: From the fault's end until the mesh was whole again, seconds; None where it was not.
    whole_s: float | None = None
    #: Aims that were missed.
    misses: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.misses


#: Told what happens, line by line.
Tell = Callable[[str], None]


@dataclass(slots=True, eq=False)
class Arena:
    """A whole mesh under load."""

    world: World
    load: Load
    journal: Journal
    pace: Pace
    tell: Tell

    async def run(self, scenario: Scenario, seed: int) -> Outcome:
        """One scenario, from a whole mesh to a whole mesh."""
        outcome = Outcome(scenario, self.world.shape.registry)
        await scenario.fault.prepare(self.world)
        if lack := await self.world.wait_whole(START_S):
            outcome.misses.append(f"not whole before the fault: {lack}")
            return outcome
        held = await Holdings.of(self.world)
        from_s = time.monotonic()
        await self.world.note_work(self.pace.before_s)
        fault_s = time.monotonic()
        outcome.struck, undo = await scenario.fault.inject(self.world, random.Random(f"{seed} {scenario.name}"))
        self.tell(f"{scenario.name}: {outcome.struck}")
        await asyncio.sleep(max(0.0, fault_s + scenario.fault_s - time.monotonic()))
        await undo()
        undone_s = time.monotonic()
        lack = await self.world.wait_whole(scenario.aims.whole_s)
        outcome.whole_s = None if lack else time.monotonic() - undone_s
        await asyncio.sleep(max(0.0, undone_s + self.pace.after_s - time.monotonic()))
        window = Window(from_s, fault_s, undone_s, time.monotonic())
        await self._all_ended(window)
        outcome.verdict = judge(self.journal, window)
        outcome.misses += outcome.verdict.misses(scenario.aims)
        if lack:
            outcome.misses.append(f"not whole {scenario.aims.whole_s:g} s after the fault: {lack}")
        else:
            outcome.misses += await strays(self.world) + held.grown(await Holdings.of(self.world))
        return outcome

    async def _all_ended(self, window: Window) -> None:
        """Returns once every request of the window has ended, or should have long ago."""
        mix = self.load.mix
        give_up_s = time.monotonic() + max(mix.timeout_s, mix.stream_timeout_s if mix.stream else 0.0) + 2.0
        while time.monotonic() < give_up_s and any(record.ended_s is None for record in self.journal.between(window.from_s, window.to_s)):
            await asyncio.sleep(0.05)


@asynccontextmanager
async def open_arena(
    shape: Shape, mix: Mix, seed: int, pace: Pace, tell: Tell, keep: Path | None = None
) -> AsyncIterator[Arena]:
    """A mesh that is whole, with load on it whose right answers are known. Raises AssertionError where it does not become whole."""
    async with open_world(shape, keep) as world:
        tell(f"a mesh of {len(world.members)} services starts on the {shape.registry} registry")
        lack = await world.wait_whole(START_S)
        assert not lack, f"the mesh was not whole after {START_S:g} s: {lack}\n{world.logs()}"
        async with Calls(world.gateways()) as calls, asyncio.TaskGroup() as tasks:
            journal = Journal()
            load = Load(calls, mix, seed, journal)
            await load.learn()
            pulse = tasks.create_task(journal.keep_pulse())
            sending = tasks.create_task(load.run())
            try:
                yield Arena(world, load, journal, pace, tell)
            finally:
                load.finish()
                pulse.cancel()
            await sending


async def run_scenarios(
    scenarios: Sequence[Scenario], shape: Shape, mix: Mix, seed: int, pace: Pace, tell: Tell, on_outcome: Callable[[Outcome], None],
    until_s: float, keep: Path | None = None,
) -> None:
    """All that can be run here, each outcome told as it comes. A mesh that does not become whole again is replaced by a new one; what is
    not begun by `until_s` is missed."""
    waiting: list[Scenario] = []
    for scenario in scenarios:
        if why := obstacle(scenario, shape.registry):
            on_outcome(Outcome(scenario, shape.registry, skipped=why))
        else:
            waiting.append(scenario)
    num_meshes = 0
    while waiting and time.monotonic() < until_s:
        num_meshes += 1
        kept = None if keep is None else keep / f"{shape.registry}-{num_meshes}"
        async with open_arena(shape, mix, seed, pace, tell, kept) as arena:
            while waiting and time.monotonic() < until_s:
                outcome = await arena.run(waiting.pop(0), seed)
                on_outcome(outcome)
                if outcome.whole_s is None:
                    tell("the mesh is not whole: another one takes its place")
                    break
    for scenario in waiting:
        on_outcome(Outcome(scenario, shape.registry, misses=["not run: out of time"]))

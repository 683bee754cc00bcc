"""A group of one rank: nothing to link."""

from __future__ import annotations

from tensorway_worker.engines.port import Engine
from tensorway_worker.rank.differentiation import LocalDifferentiator
from tensorway_worker.rank.gradient_port import Differentiator
from tensorway_worker.rank.group_port import StepRunner
from tensorway_worker.rank.memory import GuardedRun, MemoryGuard


class SoloGroup:
    """Implements `RankGroup`: steps run in the torch thread itself."""

    num_conductors = 0

    def __init__(self, engine: Engine, guard: MemoryGuard | None = None) -> None:
        self._engine = engine
        # Bound once: where nothing limits memory, the hot path goes straight to the engine.
        self.run: StepRunner = engine.run if guard is None else GuardedRun(guard, engine.run, checks=True)

    def differentiator(self, name: str) -> Differentiator:
        return LocalDifferentiator(self._engine)

    def leave(self) -> None:
        return

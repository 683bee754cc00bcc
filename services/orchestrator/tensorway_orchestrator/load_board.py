"""Tells the mesh what this orchestrator has to do: its loads as a document of the registry, and as metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Final

from tensorway.errors import TensorwayError
from tensorway.loads import ModelLoad, encode_loads, load_key
from tensorway.registry.port import Registry
from tensorway_orchestrator.outage import Outage
from tensorway_orchestrator.scaling import ACTIVE_S

#: How often loads are read, and at most written, seconds.
_EVERY_S: Final = 1.0
#: A change by so much of the value is worth telling, and one by so much at all.
_NOTICEABLE: Final = 0.1
_RATIO_FLOOR: Final = 0.02


class LoadBoard:
    """Publishes what `read` says, until cancelled."""

    def __init__(
        self, orchestrator: str, registry: Registry, read: Callable[[float], tuple[ModelLoad, ...]], called: asyncio.Event,
        on_loads: Callable[[tuple[ModelLoad, ...]], None],
    ) -> None:
        """`read` takes the monotonic instant; `called` is set when a request comes for a model that has no replica, which is told at once;
        `on_loads` gets every reading, told or not."""
        self._key = load_key(orchestrator)
        self._registry = registry
        self._read = read
        self._called = called
        self._on_loads = on_loads
        self._told: tuple[ModelLoad, ...] | None = None
        self._outage = Outage("telling the load")

    async def run(self) -> None:
        """Until cancelled; then takes the document away."""
        try:
            while True:
                await self._tell(self._read(time.monotonic()))
                try:
                    async with asyncio.timeout(_EVERY_S):
                        await self._called.wait()
                except TimeoutError:
                    continue
                self._called.clear()
        finally:
            try:
                await self._registry.delete(self._key)
            except TensorwayError as error:
                # It counts for nothing once the registration is gone.
                self._outage.began(error)

    async def _tell(self, loads: tuple[ModelLoad, ...]) -> None:
        self._on_loads(loads)
        if self._told is not None and not has_changed(self._told, loads):
            return
        try:
            await self._registry.write(self._key, encode_loads(loads))
        except TensorwayError as error:
            self._outage.began(error)
            return
        self._outage.ended()
        self._told = loads


def has_changed(told: Iterable[ModelLoad], loads: Iterable[ModelLoad]) -> bool:
    """Whether the mesh should hear of it: a model came or went, woke or fell idle, or a figure moved by more than a tenth."""
    before = {(load.model, load.revision): load for load in told}
    after = {(load.model, load.revision): load for load in loads}
    return before.keys() != after.keys() or any(_differs(before[key], load) for key, load in after.items())


def _differs(old: ModelLoad, new: ModelLoad) -> bool:
    facts = (old.is_called, old.num_open > 0, old.waiting_rows > 0, old.num_groups, old.idle_s < ACTIVE_S)
    if facts != (new.is_called, new.num_open > 0, new.waiting_rows > 0, new.num_groups, new.idle_s < ACTIVE_S):
        return True
    pairs = (
        (old.arrival_rows_per_s, new.arrival_rows_per_s), (old.demand_rows_per_s, new.demand_rows_per_s), (old.queue_s, new.queue_s),
        (old.busy_groups, new.busy_groups), (old.replica_rows_per_s, new.replica_rows_per_s),
        (old.predicted_replicas, new.predicted_replicas), (old.waiting_rows, new.waiting_rows),
    )
    return any(abs(after - before) > max(_RATIO_FLOOR, _NOTICEABLE * max(abs(before), abs(after))) for before, after in pairs)

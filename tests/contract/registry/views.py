"""Watches as tests see them: the first view for which something holds, and everything that was ever shown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")
PATIENCE_S = 40.0


async def until(watch: AsyncIterator[T], holds: Callable[[T], Any]) -> T:
    """The first view of `watch` for which `holds` holds."""
    async with asyncio.timeout(PATIENCE_S), aclosing(watch) as views:  # type: ignore[type-var]
        async for view in views:
            if holds(view):
                return view
    raise AssertionError("a watch never ends")


@dataclass
class Seen(Generic[T]):
    """All views of one watch so far."""

    views: list[T] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, holds: Callable[[T], Any]) -> T:
        """The latest view, once `holds` holds for it."""
        async with asyncio.timeout(PATIENCE_S):
            while not self.views or not holds(self.views[-1]):
                self.changed.clear()
                await self.changed.wait()
        return self.views[-1]


@asynccontextmanager
async def seeing(watch: AsyncIterator[T]) -> AsyncIterator[Seen[T]]:
    """Records `watch` from its first view on."""
    seen: Seen[T] = Seen()

    async def record() -> None:
        async for view in watch:
            seen.views.append(view)
            seen.changed.set()

    async with asyncio.TaskGroup() as tasks:
        recording = tasks.create_task(record())
        await seen.until(lambda view: True)
        yield seen
        recording.cancel()


async def together(*scenarios: Coroutine[Any, Any, None]) -> None:
    """Plays all at once; the first that fails ends the others."""
    async with asyncio.TaskGroup() as tasks:
        for scenario in scenarios:
            tasks.create_task(scenario, name=scenario.__name__)

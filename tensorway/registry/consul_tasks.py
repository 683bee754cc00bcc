"""The tasks of one Consul registry. It is opened without a context manager in places: its first use begins them, `close` ends them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

_LOG = logging.getLogger(__name__)


class RegistryTasks:
    """Owns tasks from `start` to `close`."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()
        self.has_closed = False

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Begins `work`. What it raises is logged: a loop that must not end has caught everything it expects."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        """Cancels all and waits for their end."""
        self.has_closed = True
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("%s ended by an unexpected error", task.get_name(), exc_info=error)

"""Documents that members keep while they live, and that those leave behind who are killed."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterable
from typing import Final

from tensorway.errors import TensorwayError
from tensorway.registry.port import Registry

_LOG = logging.getLogger(__name__)
#: Longer than any outage of a member's that ends by itself.
_GONE_S: Final = 300.0
#: Looks within that time.
_NUM_LOOKS: Final = 5


class Leftovers:
    """Deletes `PREFIX/ID` once no member of a kind has had that id for a while. Any number of processes may do so at once."""

    def __init__(self, registry: Registry, prefix: str, kind: str, gone_s: float = _GONE_S) -> None:
        self._registry = registry
        self._prefix = prefix
        self._kind = kind
        self._gone_s = gone_s
        self._documents: frozenset[str] = frozenset()
        #: None until they have been seen.
        self._members: frozenset[str] | None = None
        #: Id -> since when it has a document and no registration, monotonic.
        self._gone_since_s: dict[str, float] = {}

    async def run(self) -> None:
        """Until cancelled. No outage of the registry ends it."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_documents(), name=f"documents {self._prefix}")
            tasks.create_task(self._follow_members(), name=f"members of kind {self._kind}")
            while True:
                await asyncio.sleep(self._gone_s / _NUM_LOOKS * random.uniform(0.5, 1.5))
                for id in self._overdue(time.monotonic()):
                    await self._remove(id)

    async def _follow_documents(self) -> None:
        async for documents in self._registry.watch_documents(self._prefix):
            self._documents = frozenset(key.removeprefix(self._prefix) for key in documents)

    async def _follow_members(self) -> None:
        async for registrations in self._registry.watch(self._kind):
            self._members = frozenset(registration.id for registration in registrations)

    def _overdue(self, now_s: float) -> Iterable[str]:
        if self._members is None:
            return ()
        since_s = self._gone_since_s
        self._gone_since_s = {id: since_s.get(id, now_s) for id in self._documents - self._members}
        return [id for id, seen_s in self._gone_since_s.items() if now_s - seen_s >= self._gone_s]

    async def _remove(self, id: str) -> None:
        try:
            # It may have come back this moment. One that comes back later still writes its document again: a node as soon as it misses it,
            # an orchestrator when its load changes.
            if any(registration.id == id for registration in await self._registry.registrations(self._kind)):
                return
            await self._registry.delete(f"{self._prefix}{id}")
        except TensorwayError as error:
            _LOG.warning("document %s%s stays for now: %s", self._prefix, id, error)
            return
        _LOG.info("document %s%s is deleted: its %s has been gone for %.0f s", self._prefix, id, self._kind, self._gone_s)

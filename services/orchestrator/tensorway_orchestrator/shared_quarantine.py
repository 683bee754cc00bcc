"""Makes the quarantine the mesh's: what killed two groups through one orchestrator kills no more through another.

Each find is a document of its own in the registry (see `quarantine_view`), so that any number of orchestrators may write at once. All watch
them: they refuse what others have found, and know after a restart what was found before. Who deletes a document lifts the quarantine. An
outage of the registry delays the news, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterable
from typing import Final

from tensorway.errors import TensorwayError
from tensorway.registry.port import Registry
from tensorway_orchestrator.outage import Outage
from tensorway_orchestrator.quarantine import KEPT_S, MAX_KEPT, Content, Quarantines
from tensorway_orchestrator.quarantine_view import QUARANTINE, Note, QuarantineView, Row, encode_note, quarantine_key

_LOG = logging.getLogger(__name__)
#: Pause before a document that could not be written is written again, seconds.
_AGAIN_S: Final = 1.0
#: How often documents whose time is over are looked for, seconds, and how many are deleted at one time.
_SWEEP_S: Final = 30.0
_MAX_DELETED: Final = 32
#: See `QuarantineView.patience_s`.
_PATIENCE_S: Final = (60.0, 180.0)


class SharedQuarantine:
    """Writes what is found here, and shows `quarantines` what others found, until cancelled."""

    def __init__(self, orchestrator: str, registry: Registry, quarantines: Quarantines) -> None:
        """Hears of every find in `quarantines` from now on."""
        self._orchestrator = orchestrator
        self._registry = registry
        self._quarantines = quarantines
        self._view = QuarantineView(orchestrator, random.uniform(*_PATIENCE_S))
        self._unwritten: dict[Content, Note] = {}
        self._has_unwritten = asyncio.Event()
        self._has_looked = asyncio.Event()
        quarantines.on_found = self._found

    async def run(self) -> None:
        """Until cancelled. No outage of the registry ends it."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow(), name="quarantine")
            tasks.create_task(self._write(), name="quarantine: finds")
            tasks.create_task(self._sweep(), name="quarantine: what is over")

    def _found(self, content: Content, groups: tuple[str, ...]) -> None:
        _LOG.warning("content that killed groups is in quarantine", extra={"fields": {**_fields(content), "groups": " ".join(groups)}})
        self._unwritten.pop(content, None)
        self._unwritten[content] = Note(time.time() + KEPT_S, self._orchestrator, groups)
        while len(self._unwritten) > MAX_KEPT:
            del self._unwritten[next(iter(self._unwritten))]
        self._has_unwritten.set()

    async def _follow(self) -> None:
        async for documents in self._registry.watch_documents(QUARANTINE):
            now_s = time.monotonic()
            for row in self._view.take(documents, time.time(), now_s):
                self._heard(row, now_s)
            self._quarantines.show(self._view.contents(), now_s)
            self._has_looked.set()

    def _heard(self, row: Row, now_s: float) -> None:
        if row.note.orchestrator != self._orchestrator and row.until_s > now_s:
            fields = {**_fields(row.content), "orchestrator": row.note.orchestrator, "seconds": round(row.until_s - now_s)}
            _LOG.info("another orchestrator has put content in quarantine", extra={"fields": fields})

    async def _write(self) -> None:
        """Writes every find, however long the registry is away, unless its time is over before."""
        outage = Outage("sharing the quarantine")
        while True:
            await self._has_unwritten.wait()
            self._has_unwritten.clear()
            while self._unwritten:
                content, note = next(iter(self._unwritten.items()))
                try:
                    if note.until_unix_s > time.time():
                        await self._delete(self._view.surplus(content.model, content.revision)[:_MAX_DELETED])
                        await self._registry.write(quarantine_key(content), encode_note(note))
                except TensorwayError as error:
                    outage.began(error)
                    await asyncio.sleep(_AGAIN_S)
                    continue
                outage.ended()
                if self._unwritten.get(content) is note:  # it may have been found again meanwhile
                    del self._unwritten[content]

    async def _sweep(self) -> None:
        """Deletes documents whose time is over, a few at a time."""
        outage = Outage("deleting what is no longer in quarantine")
        await self._has_looked.wait()
        while True:
            try:
                await self._delete(self._view.overdue(time.monotonic())[:_MAX_DELETED])
            except TensorwayError as error:
                outage.began(error)
            else:
                outage.ended()
            await asyncio.sleep(_SWEEP_S * random.uniform(0.5, 1.5))

    async def _delete(self, documents: Iterable[tuple[str, bytes]]) -> None:
        """Those that are still as they were seen: what was found again meanwhile stays."""
        for key, document in documents:
            if await self._registry.read(key) == document:
                await self._registry.delete(key)


def _fields(content: Content) -> dict[str, str]:
    return {"model": content.model, "revision": content.revision, "fingerprint": content.fingerprint}

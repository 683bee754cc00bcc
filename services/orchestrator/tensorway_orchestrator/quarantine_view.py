"""What the registry says is in quarantine, and which of its documents are to go. Pure: takes the clocks, touches nothing.

A document says until when its content is refused, on the wall clock of its writer. That is read once, when the document is first seen, and
counts on this process's monotonic clock from then on, so a clock that is set meanwhile changes nothing. Where the clocks of two hosts
differ by some seconds, one refuses for so much longer than the other. From a writer whose clock is far ahead, nothing is refused for
longer than `KEPT_S`; one whose clock is that far behind refuses what it has found itself, and the others do not heed it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final

from pydantic import Field, TypeAdapter

from tensorway_orchestrator.quarantine import KEPT_S, MAX_KEPT, Content

_LOG = logging.getLogger(__name__)
#: Document key prefix: `quarantine/MODEL.REVISION.FINGERPRINT`. One folder for all: each folder in which a process writes costs it a
#: connection to Consul, and this one is watched anyway.
QUARANTINE: Final = "quarantine/"


@dataclass(frozen=True, slots=True)
class Note:
    """A document: who has found the content, and until when it is refused, seconds since 1970 (UTC)."""

    until_unix_s: Annotated[float, Field(allow_inf_nan=False)]
    orchestrator: str
    #: The groups that it killed.
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A document as it was when it was first seen. Instants are on the monotonic clock."""

    document: bytes
    content: Content
    note: Note
    until_s: float
    since_s: float


_ADAPTER: Final[TypeAdapter[Note]] = TypeAdapter(Note)


def quarantine_key(content: Content) -> str:
    """Key of a content's document."""
    return f"{QUARANTINE}{content.model}.{content.revision}.{content.fingerprint}"


def encode_note(note: Note) -> bytes:
    """The document."""
    return _ADAPTER.dump_json(note)


@dataclass(slots=True)
class QuarantineView:
    """The documents under `quarantine/`. Those that cannot be read are ignored, and left to whoever can."""

    #: Whose view it is.
    orchestrator: str
    #: How much longer than its time a document of another is left to its finder, seconds: not the same for any two orchestrators, so that
    #: one deletes what the finder did not live to delete, and the others see that.
    patience_s: float
    _rows: dict[str, Row] = field(default_factory=dict)
    _unreadable: dict[str, bytes] = field(default_factory=dict)

    def take(self, documents: Mapping[str, bytes], unix_s: float, now_s: float) -> list[Row]:
        """All documents as they are now. Returns the new ones."""
        rows: dict[str, Row] = {}
        unreadable: dict[str, bytes] = {}
        new: list[Row] = []
        for key, document in documents.items():
            row = self._rows.get(key)
            if row is None or row.document != document:
                row = self._read(key, document, unix_s, now_s)
                if row is not None:
                    new.append(row)
            if row is None:
                unreadable[key] = document
            else:
                rows[key] = row
        self._rows, self._unreadable = rows, unreadable
        return new

    def contents(self) -> dict[Content, float]:
        """What is in quarantine, and until when."""
        return {row.content: row.until_s for row in self._rows.values()}

    def overdue(self, now_s: float) -> list[tuple[str, bytes]]:
        """Keys and values of the documents to delete: own ones whose time is over, and those of others that were watched for longer than
        any is refused. So nobody whose clock is wrong deletes what others still heed."""
        return [(key, row.document) for key, row in self._rows.items() if row.until_s <= now_s and self._may_delete(row, now_s)]

    def surplus(self, model: str, revision: str) -> list[tuple[str, bytes]]:
        """Keys and values of those to delete before one more of that revision is written, the soonest to end first."""
        rows = [(key, row) for key, row in self._rows.items() if (row.content.model, row.content.revision) == (model, revision)]
        rows.sort(key=lambda each: each[1].until_s)
        return [(key, row.document) for key, row in rows[: max(0, len(rows) - MAX_KEPT + 1)]]

    def _may_delete(self, row: Row, now_s: float) -> bool:
        return row.note.orchestrator == self.orchestrator or now_s - row.since_s >= KEPT_S + self.patience_s

    def _read(self, key: str, document: bytes, unix_s: float, now_s: float) -> Row | None:
        parts = key.removeprefix(QUARANTINE).rsplit(".", 2)  # a model's name may have dots of its own
        try:
            if len(parts) != 3:
                raise ValueError("its key is not MODEL.REVISION.FINGERPRINT")
            note = _ADAPTER.validate_json(document)
        except ValueError as error:  # pydantic's ValidationError is one
            if self._unreadable.get(key) != document:
                _LOG.error("document %s puts nothing in quarantine and is ignored: %s", key, error)
            return None
        until_s = now_s + min(KEPT_S, note.until_unix_s - unix_s)
        return Row(document, Content(*parts), note, until_s, now_s)

"""Answers of `/v1/health/service`, of which only what has changed is decoded.

Consul answers with every row of a service when one of them changes: two megabytes for a thousand groups. Decoding them would hold up every
request of a gateway for tens of milliseconds. So rows are told apart in the undecoded text, and one that reads as before is not decoded.
"""

from __future__ import annotations

import json
from typing import Final

from tensorway.registry.consul_rows import Row, read_row

#: How a row begins. It cannot stand inside of a JSON string, where quotation marks are escaped; a check says `"Node":"…"`, not `"Node":{`.
_BEGIN: Final = '{"Node":{'


class EntryReader:
    """Reads one answer after another."""

    def __init__(self) -> None:
        self._known: dict[str, Row | None] = {}
        #: Rows decoded so far.
        self.num_decoded = 0

    def read(self, text: str) -> list[Row]:
        """The rows of this mesh's making in `text`. Raises ValueError for what is no JSON."""
        known: dict[str, Row | None] = {}
        for entry in _split(text):
            known[entry] = self._known[entry] if entry in self._known else self._decode(entry)
        self._known = known
        return [row for row in known.values() if row is not None]

    def _decode(self, entry: str) -> Row | None:
        self.num_decoded += 1
        return read_row(json.loads(entry))


def _split(text: str) -> list[str]:
    """The entries of a JSON list, undecoded where they are written as Consul writes them."""
    text = text.strip()
    if text.startswith(f"[{_BEGIN}") and text.endswith("}]"):
        first, *others = text[1:-1].split(f",{_BEGIN}")
        return [first, *(_BEGIN + other for other in others)]
    return [json.dumps(entry) for entry in json.loads(text) or ()]

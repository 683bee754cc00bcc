"""The text of one answer while it is made: whole characters, and nothing that may become a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensorway_worker.engines.generation.requests import StopRules

if TYPE_CHECKING:
    from tensorway_worker.engines.generation.text import TextSide


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added to the text."""

    text: str
    #: The stop string that ended the answer; `text` is then its last piece.
    stop_match: str | None = None


class TextStream:
    """Tokens in, pieces of text out. Joined, the pieces are what the tokeniser makes of all the tokens, up to the first stop string.

    All of it follows from the ids alone: one who replays them goes on as if nothing had happened.
    """

    def __init__(self, text: TextSide, prompt_ids: Sequence[int], stop: StopRules) -> None:
        self._decoding = text.decoding(prompt_ids)
        self._stops = StopStrings(stop.strings, stop.include_stop) if stop.strings else None

    def take(self, token_id: int) -> Piece:
        """The next token of the answer. After a piece with a `stop_match` the answer is over."""
        added = self._decoding.add(token_id)
        if self._stops is None or not added:
            return Piece(added)
        return self._stops.take(added)

    def flush(self) -> str:
        """What is left when an answer ends otherwise than by a stop string: text that was held back, incomplete bytes as U+FFFD."""
        rest = self._decoding.end()
        if self._stops is None:
            return rest
        piece = self._stops.take(rest)
        return piece.text if piece.stop_match is not None else piece.text + self._stops.held

    def replay(self, ids: Iterable[int]) -> None:
        """Goes through tokens whose text is known already."""
        for token_id in ids:
            self.take(token_id)


class StopStrings:
    """Finds the stop string that is complete first, however the text is cut into pieces; of two that end at once, the longer.

    Text that a stop string may begin with is held back until it is clear that none does.
    """

    def __init__(self, strings: Sequence[str], include_stop: bool) -> None:
        """
        Args:
            strings: none of them empty.
        """
        self._strings = tuple(strings)
        self._first_letters = frozenset(string[0] for string in strings)
        self._longest = max(map(len, strings))
        self._include_stop = include_stop
        #: The longest end of the text so far that may become a stop string.
        self.held = ""

    def take(self, added: str) -> Piece:
        """The text goes on with `added`."""
        text = self.held + added
        found = min(((place + len(string), place, string) for string in self._strings if (place := text.find(string)) >= 0), default=None)
        if found is not None:
            end, start, string = found
            self.held = ""
            return Piece(text[: end if self._include_stop else start], string)
        start = self._beginning(text)
        self.held = text[start:]
        return Piece(text[:start])

    def _beginning(self, text: str) -> int:
        """Where the longest end of `text` begins that a stop string begins with."""
        for place in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[place] in self._first_letters:
                end = text[place:]
                if any(string.startswith(end) for string in self._strings):
                    return place
        return len(text)

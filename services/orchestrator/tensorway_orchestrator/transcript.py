"""What is known of one choice of a generation: the tokens that a group has said so far. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from tensorway.errors import InvalidRequest


class Piece(Protocol):
    """One message of a stream before it has its number: `started`, a delta or `finished`."""

    @property
    def choice(self) -> int:
        """Which of the choices; 0 for `started`."""

    @property
    def is_text(self) -> bool:
        """True for a delta of the answer itself (the prompt, echoed, is none)."""

    @property
    def is_prompt(self) -> bool: ...

    @property
    def is_finished(self) -> bool: ...

    @property
    def offset(self) -> int:
        """Of a delta: tokens of the choice before it."""

    @property
    def token_ids(self) -> Sequence[int]:
        """Of a delta; empty for anything else."""

    def join(self, later: Self) -> None:
        """Appends a later delta of the same choice."""

    def write(self, sequence: int) -> bytes:
        """The serialised message with its number."""


@dataclass(slots=True)
class Transcript:
    """Grows with every delta; a choice that is begun again on another group goes on from here."""

    #: Four bytes a token, not an object each: a stream may wait long for its client.
    token_ids: array[int] = field(default_factory=lambda: array("I"))
    has_prompt: bool = False
    is_finished: bool = False

    def take(self, piece: Piece) -> None:
        """Adds what a group has said. Raises InvalidRequest where that does not follow from what was said before."""
        if self.is_finished:
            raise InvalidRequest("a message came after `finished`", field="event")
        if piece.is_finished:
            self.is_finished = True
        elif piece.is_prompt:
            if self.has_prompt:
                raise InvalidRequest("the prompt came twice", field="delta.is_prompt")
            self.has_prompt = True
        elif piece.is_text:
            if piece.offset != len(self.token_ids):
                raise InvalidRequest(f"a delta begins at token {piece.offset}, not at {len(self.token_ids)}", field="delta.offset")
            for token_id in piece.token_ids:
                self.token_ids.append(token_id)
        else:
            raise InvalidRequest("a message is neither a delta nor `finished`", field="event")

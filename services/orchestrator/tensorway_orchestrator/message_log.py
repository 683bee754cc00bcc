"""The messages of one stream: what was numbered and sent, and what waits for credit, joined. Pure.

A message gets its number when it leaves. Until then a later delta of the same choice joins it, so that what waits for a slow reader is at
most a prompt, a delta and a `finished` for each choice. What has left stays, word for word, for a client that comes back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from tensorway.errors import InvalidRequest, NotFound
from tensorway_orchestrator.transcript import Piece

#: What Python keeps beside the bytes of a message.
_MESSAGE_OVERHEAD_BYTES: Final = 41


@dataclass(slots=True)
class MessageLog:
    """One stream's."""

    #: Sequence number of the first message here; above 0 where another orchestrator sent those before.
    base: int = 0
    #: Sequence number of the next message that the reader gets.
    next_sequence: int = 0
    #: Memory of the messages, bytes.
    num_bytes: int = 0
    messages: list[bytes] = field(default_factory=list)
    waiting: list[Piece] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Sequence number of the next message that is to be numbered."""
        return self.base + len(self.messages)

    @property
    def is_read(self) -> bool:
        """True where nothing is left for the reader."""
        return not self.waiting and self.next_sequence == self.end

    def offer(self, piece: Piece) -> None:
        """Adds a message behind those that wait, or to the delta of its choice that waits."""
        if self.waiting and piece.is_text:
            last = next((other for other in reversed(self.waiting) if other.choice == piece.choice), None)
            if last is not None and last.is_text:
                last.join(piece)
                return
        self.waiting.append(piece)

    def write(self, piece: Piece) -> bytes:
        """The reader's next message is `piece`: the reader has all that came before it."""
        message = piece.write(self.next_sequence)
        self.messages.append(message)
        self.num_bytes += len(message) + _MESSAGE_OVERHEAD_BYTES
        self.next_sequence += 1
        return message

    def next_message(self) -> bytes | None:
        """The reader's next message; None where there is none yet."""
        index = self.next_sequence - self.base
        if index == len(self.messages):
            if not self.waiting:
                return None
            return self.write(self.waiting.pop(0))
        self.next_sequence += 1
        return self.messages[index]

    def rewind(self, sequence: int, stream_id: str) -> None:
        """Begins again at `sequence`. Raises InvalidRequest for one that was never sent, NotFound for one that is not here."""
        if sequence > self.end:
            raise InvalidRequest(
                f"next_sequence {sequence} is ahead of stream {stream_id!r}, which has sent {self.end} messages: use one more than the "
                "last that was received", field="resume.next_sequence",
            )
        if sequence < self.base:
            raise NotFound(
                f"stream {stream_id!r} moved here at message {self.base}; those before it, from {sequence} on, went with the orchestrator "
                "that was lost", field="resume.next_sequence",
            )
        self.next_sequence = sequence

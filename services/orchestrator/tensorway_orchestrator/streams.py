"""One client's generation: its choices, and its reader. Pure: acts only through the exchange that it was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tensorway.transport.port import Exchange
from tensorway_orchestrator.message_log import MessageLog
from tensorway_orchestrator.survival import Record
from tensorway_orchestrator.transcript import Piece, Transcript

if TYPE_CHECKING:
    from tensorway_orchestrator.request_trace import RequestTrace


@dataclass(frozen=True, slots=True)
class Generation:
    """What a client asked for."""

    request_id: str
    priority: int
    num_choices: int
    seed: int
    #: The serialised RequestHead that leaders get.
    head: bytes
    #: Chained hashes of the prompt's blocks; see `prefixes`.
    blocks: tuple[bytes, ...]
    stream_id: str
    #: Above 0, with what the client has of each choice: the stream of an orchestrator that was lost.
    next_sequence: int = 0
    so_far: tuple[Transcript, ...] = ()
    #: Whether anybody knows its id.
    is_resumable: bool = True
    #: One for each choice; none where it is not sampled.
    traces: tuple[RequestTrace, ...] = ()


class Running(Protocol):
    """An attempt that a group has."""

    def cancel(self) -> None:
        """Frees its place there."""


@dataclass(slots=True, eq=False)
class Choice:
    """One of a stream's answers."""

    index: int
    stream: Stream
    transcript: Transcript
    record: Record = field(default_factory=Record)
    #: Set while a group works on it.
    attempt: Running | None = None
    #: Its number in the queue while it waits there, else 0.
    ticket: int = 0
    #: Text without a token: the end of an answer, which a group that resumes the choice would say again. Held for what follows it.
    held: Piece | None = None
    #: None where it is not sampled.
    trace: RequestTrace | None = None
    #: When its last tokens came, on the monotonic clock; 0: it has none.
    said_s: float = 0.0

    def gap_s(self, now_s: float) -> float | None:
        """Tokens have come: seconds since those before them, whatever lay between. None for the first."""
        before_s, self.said_s = self.said_s, now_s
        return now_s - before_s if before_s else None

    def take(self, piece: Piece) -> tuple[Piece, ...]:
        """What becomes of a message of the group: none, one or two for the log. Raises InvalidRequest where it does not follow."""
        self.transcript.take(piece)
        held, self.held = self.held, None
        if piece.is_text and not piece.token_ids:
            if held is not None:
                held.join(piece)
            self.held = held or piece
            return ()
        return (piece,) if held is None else (held, piece)

    def stop(self) -> None:
        """No group works on it from here on."""
        attempt, self.attempt, self.held = self.attempt, None, None
        if attempt is not None:
            attempt.cancel()
        if self.trace is not None and not self.transcript.is_finished:
            self.trace.stopped()


@dataclass(slots=True, eq=False)
class Stream:
    """From the first message to the last, over all its groups and readers."""

    generation: Generation
    arrived_s: float
    #: On the monotonic clock; the reader's.
    deadline_s: float
    log: MessageLog
    choices: Sequence[Choice] = ()
    #: Who reads it; None while it is parked.
    origin: Exchange | None = None
    #: When the first attempt left; 0: none has.
    sent_s: float = 0.0
    #: Ends the deadline's timer.
    stop_timer: Callable[[], None] | None = None

    @property
    def id(self) -> str:
        return self.generation.stream_id

    @property
    def is_finished(self) -> bool:
        """True once every choice is."""
        return all(choice.transcript.is_finished for choice in self.choices)

    @property
    def has_begun(self) -> bool:
        """True once any answer has a token."""
        return any(choice.transcript.token_ids or choice.transcript.is_finished for choice in self.choices)

    @property
    def is_running(self) -> bool:
        """True while a group works on it."""
        return any(choice.attempt is not None for choice in self.choices)

    @property
    def num_bytes(self) -> int:
        """Memory, about."""
        return self.log.num_bytes + len(self.generation.head) + sum(4 * len(choice.transcript.token_ids) for choice in self.choices)

    def say(self, piece: Piece) -> bool:
        """The reader's next message, sent at once where it has credit. False: a `flush` is due, as the message waits or may be the last."""
        origin = self.origin
        if origin is None or not origin.credit or not self.log.is_read:
            self.log.offer(piece)
            return False
        origin.push(self.log.write(piece))
        return not piece.is_finished

    def flush(self) -> bool:
        """Sends what the reader has credit for. True once all is said; the reader's exchange is then answered."""
        origin = self.origin
        if origin is None:
            return False
        while origin.credit and (message := self.log.next_message()) is not None:
            origin.push(message)
        if not self.log.is_read or not self.is_finished:
            return False
        origin.reply(b"", ())
        return True


def open_stream(generation: Generation, arrived_s: float, deadline_s: float) -> Stream:
    """A stream before its first message, or where another orchestrator left it."""
    log = MessageLog(base=generation.next_sequence, next_sequence=generation.next_sequence)
    stream = Stream(generation, arrived_s, deadline_s, log)
    transcripts = generation.so_far or tuple(Transcript() for _ in range(generation.num_choices))
    stream.choices = tuple(
        Choice(
            index, stream, transcript, Record(num_attempts=int(bool(generation.so_far))),
            trace=generation.traces[index] if generation.traces else None,
            # When another orchestrator passed on its last token is not known here, but not later than this.
            said_s=arrived_s if transcript.token_ids else 0.0,
        )
        for index, transcript in enumerate(transcripts)
    )
    return stream

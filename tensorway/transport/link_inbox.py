"""Payloads on their way in: puts the chunks of each back together, without joining them. Pure."""

from __future__ import annotations

from typing import Final

from tensorway.deadline import Deadline
from tensorway.errors import InvalidRequest
from tensorway.tensors import Buffer
from tensorway.transport.frames import Frame
from tensorway.transport.port import Payload

#: Payloads that may be unfinished at once on one link; far above what chunked senders need, and a bound for hostile ones.
MAX_UNFINISHED: Final = 4096


class Arrival:
    """A frame whose payload is complete. `payload` is None where it exceeded the limit and was dropped."""

    __slots__ = ("deadline", "first", "num_bytes", "payload", "segments")

    def __init__(self, first: Frame, deadline: Deadline | None) -> None:
        self.first = first
        #: Set when the first frame arrived: the time its chunks take counts.
        self.deadline = deadline
        self.segments: list[Buffer] = [first.body]
        self.num_bytes = len(first.body)
        self.payload: Payload | None = None


class Inbox:
    """Unfinished payloads of one link, each bounded by `max_message_bytes`."""

    __slots__ = ("_max_message_bytes", "_unfinished")

    def __init__(self, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes
        self._unfinished: dict[int, Arrival | None] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes held for payloads that are not complete."""
        return sum(arrival.num_bytes for arrival in self._unfinished.values() if arrival is not None)

    def begin(self, frame: Frame, deadline: Deadline | None = None) -> None:
        """Takes the first frame of a payload of which more follows. Raises InvalidRequest where the id is taken or too many wait."""
        if frame.id in self._unfinished:
            raise InvalidRequest(f"id {frame.id} is used twice while its payload is unfinished", field="frames.id")
        if len(self._unfinished) >= MAX_UNFINISHED:
            raise InvalidRequest(f"more than {MAX_UNFINISHED} payloads are unfinished", field="frames")
        self._unfinished[frame.id] = Arrival(frame, deadline)

    def add(self, frame: Frame) -> Arrival | None:
        """Takes one chunk; returns the arrival with its last. Chunks of an id that was dropped are ignored; raises InvalidRequest for
        one that never began."""
        if frame.id not in self._unfinished:
            raise InvalidRequest(f"a chunk has the id {frame.id}, of which nothing is expected", field="frames.id")
        arrival = self._unfinished[frame.id]
        if not frame.has_more:
            del self._unfinished[frame.id]
        if arrival is None:
            return None
        arrival.num_bytes += len(frame.body)
        if arrival.num_bytes > self._max_message_bytes:
            arrival.segments.clear()
            if frame.has_more:
                # The rest is still on its way: it is read past, and not kept.
                self._unfinished[frame.id] = None
            return arrival
        arrival.segments.append(frame.body)
        if frame.has_more:
            return None
        arrival.payload = tuple(arrival.segments)
        return arrival

    def drop(self, id: int, is_cancelled: bool) -> None:
        """Lets go of the payload of `id`, if one is unfinished: for good where the sender cancelled, otherwise its chunks still come."""
        if id in self._unfinished:
            if is_cancelled:
                del self._unfinished[id]
            else:
                self._unfinished[id] = None

"""What waits to leave on a link, and how it is packed into messages. Pure but for the clock that stamps deadlines."""

from __future__ import annotations

import time
from collections import deque
from enum import Enum
from typing import Final

from tensorway.deadline import Deadline
from tensorway.tensors import Buffer
from tensorway.transport.frames import CHUNK, CHUNK_BYTES, CREDIT, HEADER, HEADER_BYTES, MORE, TOKEN, message_prefix
from tensorway.transport.link_traffic import TRAFFIC
from tensorway.transport.port import Payload

#: A message takes no further frame once it has this many bytes.
FULL_MESSAGE_BYTES: Final = 1 << 20


class Progress(Enum):
    """How much of a frame's payload had left when it was withdrawn."""

    UNSENT = "unsent"
    #: The peer waits for chunks that will not come, and must be told.
    PARTIAL = "partial"
    LEFT = "left"


#: Of frames without a body; never changed.
_NOTHING: Final[deque[Buffer]] = deque()


class _Parcel:
    """One frame that waits, or the rest of a large one."""

    __slots__ = ("body_bytes", "deadline", "head", "id", "kind", "offset", "segments", "value")

    def __init__(self, kind: int, id: int, head: bytes, payload: Payload, body_bytes: int, deadline: Deadline | None, value: int) -> None:
        self.kind = kind
        self.id = id
        self.head = head
        self.segments = deque(payload) if payload else _NOTHING
        #: Bytes of body that have not left.
        self.body_bytes = body_bytes
        self.deadline = deadline
        #: The header's last field, where no deadline is stamped there.
        self.value = value
        #: Bytes of `segments[0]` that have left.
        self.offset = 0

    def take(self, limit: int, parts: list[Buffer]) -> int:
        """Moves at most `limit` body bytes into `parts`; returns how many."""
        taken = 0
        while self.segments and taken < limit:
            segment = self.segments[0]
            rest = len(segment) - self.offset
            if rest <= limit - taken:
                parts.append(memoryview(segment)[self.offset :] if self.offset else segment)
                taken += rest
                self.segments.popleft()
                self.offset = 0
            else:
                stop = self.offset + limit - taken
                parts.append(memoryview(segment)[self.offset : stop])
                self.offset = stop
                taken = limit
        self.body_bytes -= taken
        return taken


class Outbox:
    """Frames in order of arrival. Large bodies leave chunk by chunk, in turn, so that small frames never wait for a whole one."""

    __slots__ = ("_large", "_small", "num_bytes")

    def __init__(self) -> None:
        self._small: deque[_Parcel] = deque()
        self._large: deque[_Parcel] = deque()
        #: Head and body bytes that have not left.
        self.num_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._small or self._large)

    def offer(
        self, kind: int, id: int, head: bytes = b"", payload: Payload = (), deadline: Deadline | None = None, value: int = 0
    ) -> None:
        """Queues one frame. Payload segments must be flat bytes (format B) and stay unchanged until they have left. `value` is the header's
        last field of a frame without a deadline."""
        body_bytes = 0
        for segment in payload:
            body_bytes += len(segment)
        parcel = _Parcel(kind, id, head, payload, body_bytes, deadline, value)
        (self._small if body_bytes <= CHUNK_BYTES else self._large).append(parcel)
        self.num_bytes += len(head) + body_bytes

    def withdraw(self, id: int) -> Progress:
        """Drops what has not left of the frames of `id`, and says how much the peer has heard of its request or answer. Tokens and credit
        beside these say nothing of them."""
        progress = Progress.LEFT
        for queue in (self._small, self._large):
            for parcel in [waiting for waiting in queue if waiting.id == id]:
                queue.remove(parcel)
                self.num_bytes -= len(parcel.head) + parcel.body_bytes
                if parcel.kind == CHUNK:
                    progress = Progress.PARTIAL
                elif parcel.kind not in (TOKEN, CREDIT):
                    progress = Progress.UNSENT
        return progress

    def clear(self) -> None:
        """Drops everything."""
        self._small.clear()
        self._large.clear()
        self.num_bytes = 0

    def take(self) -> bytes | None:
        """The next message: small frames up to about 1 MiB, then one chunk of the large body whose turn it is. None where nothing waits."""
        parts: list[Buffer] = [b""]
        size = 0
        now_s = time.monotonic()
        small = self._small
        num_waiting = len(small)
        while small and size < FULL_MESSAGE_BYTES:
            parcel = small.popleft()
            if parcel.body_bytes or parcel.deadline is not None:
                size += self._pack(parcel, CHUNK_BYTES, now_s, parts)
            else:
                head = parcel.head
                parts.append(HEADER.pack(parcel.kind, 0, 0, parcel.id, len(head), 0, parcel.value))
                parts.append(head)
                self.num_bytes -= len(head)
                size += HEADER_BYTES + len(head)
        num_frames = num_waiting - len(small)
        if self._large and size < FULL_MESSAGE_BYTES:
            num_frames += 1
            parcel = self._large.popleft()
            size += self._pack(parcel, CHUNK_BYTES, now_s, parts)
            if parcel.body_bytes:
                parcel.kind, parcel.head, parcel.deadline = CHUNK, b"", None
                self._large.append(parcel)
        if not size:
            return None
        TRAFFIC.num_sent_frames += num_frames
        TRAFFIC.num_sent_messages += 1
        TRAFFIC.num_sent_bytes += size
        parts[0] = message_prefix(size)
        return b"".join(parts)

    def _pack(self, parcel: _Parcel, limit: int, now_s: float, parts: list[Buffer]) -> int:
        """Appends one frame of `parcel` to `parts`; returns the frame's bytes."""
        head = parcel.head
        at = len(parts)
        parts.append(b"")
        parts.append(head)
        body_bytes = parcel.take(limit, parts)
        flags = MORE if parcel.body_bytes else 0
        deadline = parcel.deadline
        # Stamped when the frame really leaves: time spent in the outbox counts. 0 would mean "no deadline".
        value = max(1, int((deadline.at_s - now_s) * 1e6)) if deadline is not None else parcel.value
        parts[at] = HEADER.pack(parcel.kind, flags, 0, parcel.id, len(head), body_bytes, value)
        size = HEADER_BYTES + len(head) + body_bytes
        self.num_bytes -= size - HEADER_BYTES
        return size

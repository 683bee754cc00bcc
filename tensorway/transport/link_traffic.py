"""What this process sends and receives over its links, in plain integers: a message costs a few additions and allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(slots=True)
class LinkTraffic:
    """Frames and messages of all links of one process since its start. Several frames leave in one message where several waited."""

    num_sent_frames: int = 0
    num_sent_messages: int = 0
    num_sent_bytes: int = 0
    num_received_frames: int = 0
    num_received_messages: int = 0
    num_received_bytes: int = 0

    def took(self, num_frames: int, num_bytes: int) -> None:
        """One message with frames came."""
        self.num_received_frames += num_frames
        self.num_received_messages += 1
        self.num_received_bytes += num_bytes


#: Of this process. Links live in one event loop, so that nothing needs a lock.
TRAFFIC: Final = LinkTraffic()

"""One choice on one group, from its sending to its end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final, Protocol

from tensorway.errors import TensorwayError
from tensorway.telemetry.tracing import Span
from tensorway.transport.port import TOKEN_CREDIT, Payload
from tensorway_orchestrator.pool import Group, Sending
from tensorway_orchestrator.request_trace import message_of
from tensorway_orchestrator.streams import Choice

#: Tokens are granted so many at a time.
_GRANT: Final = TOKEN_CREDIT // 2


class AttemptListener(Protocol):
    """The lane, which decides what follows."""

    def token(self, attempt: Attempt, head: bytes) -> None:
        """The group has said something."""

    def ended(self, attempt: Attempt, error: TensorwayError | None) -> None:
        """The group has answered, or was lost. The attempt's place is free."""


@dataclass(slots=True, eq=False)
class Attempt:
    """See `tensorway.transport.port.TokenSink`. Holds one of its group's places until it is over."""

    listener: AttemptListener
    group: Group
    choice: Choice
    sent_s: float
    deadline_s: float
    sending: Sending = field(init=False)
    link_id: int = -1
    #: Whether it brought a token.
    has_progressed: bool = False
    is_over: bool = False
    #: None where the generation is not sampled.
    span: Span | None = None
    #: Token frames that are not granted yet.
    _num_taken: int = 0

    def __post_init__(self) -> None:
        self.sending = self.group.begin(1, self.sent_s)
        if self.choice.trace is not None:
            self.span = self.choice.trace.sent(self.group.id, self.sent_s)

    def on_token(self, head: bytes) -> None:
        if self.span is not None and not self.span.events:
            self.span.add_event("first message")
        # Whoever reads them: what has come is kept here, and is bounded by the length of the answer.
        self._num_taken += 1
        if self._num_taken == _GRANT:
            self._num_taken = 0
            self.group.link.grant(self.link_id, _GRANT)
        self.listener.token(self, head)

    def on_reply(self, head: bytes, payload: Payload) -> None:
        self._end()
        self.listener.ended(self, None)
        self._told("" if self.choice.transcript.is_finished else "the answer was not finished")

    def on_error(self, error: TensorwayError) -> None:
        self._end()
        self.listener.ended(self, error)
        self._told(message_of(error))

    def cancel(self) -> None:
        """Tells the group that nobody wants the rest. The listener hears no more of it. Harmless where it is over."""
        if not self.is_over:
            self._end()
            self.group.link.cancel(self.link_id)
            self._told("CANCELLED: nobody waits for it any more")

    def _told(self, error: str) -> None:
        """Records the span, where there is one."""
        if self.span is not None and self.choice.trace is not None:
            self.choice.trace.ended(self.span, time.monotonic(), error, waits=bool(self.choice.ticket))

    def _end(self) -> None:
        self.is_over = True
        self.sending.end(time.monotonic())

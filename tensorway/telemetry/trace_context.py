"""What ties spans to one trace: the W3C trace context (https://www.w3.org/TR/trace-context/). Pure but for the drawing of ids.

    traceparent   00-<trace id, 32 hex digits>-<span id, 16 hex digits>-<flags, 2 hex digits; bit 0: sampled>
    tracestate    what tracing systems add to it; passed on as it came

Inside the mesh only sampled requests carry a context, as one text: the traceparent, and the tracestate after a space where there is one.
"""

from __future__ import annotations

import random
import re
from typing import Final, NamedTuple

_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NO_TRACE: Final = "0" * 32
_NO_SPAN: Final = "0" * 16
_SAMPLED: Final = 0x01
#: Longer tracestates may be dropped, says the specification.
_MAX_STATE_CHARS: Final = 512
#: Of its own: whoever seeds the `random` module must not make ids repeat.
_DRAW: Final = random.Random()


class SpanContext(NamedTuple):
    """One span of a sampled trace, as others refer to it."""

    #: 32 and 16 lower-case hex digits, not all zero.
    trace_id: str
    span_id: str
    #: The tracestate; empty where there is none.
    state: str = ""

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-01"

    def to_wire(self) -> str:
        """As it travels between the services."""
        return f"{self.traceparent} {self.state}" if self.state else self.traceparent

    def child(self) -> SpanContext:
        """A new span of the same trace."""
        return SpanContext(self.trace_id, new_span_id(), self.state)


class Given(NamedTuple):
    """A caller's context."""

    context: SpanContext
    is_sampled: bool


def read_traceparent(header: str | bytes | None, state: str | bytes | None = None) -> Given | None:
    """A caller's `traceparent` and `tracestate`; None where there is no traceparent, or one that is malformed: then a new trace begins, as
    the specification says. A tracestate that is too long or no text is left out."""
    if not isinstance(header, str):
        return None
    found = _TRACEPARENT.fullmatch(header.strip())
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    # Later versions may say more after the flags; version 0 may not, and ff is none.
    if version == "ff" or (version == "00" and more) or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    is_text = isinstance(state, str) and len(state) <= _MAX_STATE_CHARS and state.isascii() and state.isprintable()
    return Given(SpanContext(trace_id, span_id, str(state).strip() if is_text else ""), bool(int(flags, 16) & _SAMPLED))


def from_wire(text: str) -> SpanContext | None:
    """What another service of the mesh says; None for an unsampled request, or what is no context."""
    header, _, state = text.partition(" ")
    given = read_traceparent(header, state) if header else None
    return given.context if given is not None and given.is_sampled else None


def new_trace() -> SpanContext:
    """The first span of a new trace."""
    return SpanContext(f"{_DRAW.getrandbits(128) or 1:032x}", new_span_id())


def new_span_id() -> str:
    """16 hex digits."""
    return f"{_DRAW.getrandbits(64) or 1:016x}"

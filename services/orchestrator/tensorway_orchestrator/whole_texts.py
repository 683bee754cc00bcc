"""Infer on a model that generates: one stream for each row of the text, gathered here, and answered together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tensorway.deadline import Deadline
from tensorway.errors import TensorwayError
from tensorway.telemetry.tracing import NO_TRACER, Tracer
from tensorway.transport.port import TOKEN_CREDIT, Exchange, Payload
from tensorway_orchestrator import text_wire
from tensorway_orchestrator.generation_lane import GenerationLane
from tensorway_orchestrator.streams import Stream
from tensorway_orchestrator.text_wire import FinishedText


class WholeTexts:
    """One request."""

    def __init__(self, lane: GenerationLane, origin: Exchange, head: text_wire.Head, tracer: Tracer = NO_TRACER) -> None:
        self._lane = lane
        self._origin = origin
        self._head = head
        self._tracer = tracer
        self._arrived_s = time.monotonic()
        self._rows: list[_Row] = []
        self._streams: list[Stream] = []
        self._num_missing = 0
        self._is_over = False

    def start(self) -> None:
        """Opens the streams. Raises InvalidRequest for inputs or parameters that no stream can be made of."""
        generations = text_wire.read_rows(self._head, self._lane.spec, self._origin.payload, self._tracer)
        self._num_missing = len(generations)
        self._rows = [_Row(generation.head, self._origin.deadline, self._row_finished, self._row_failed) for generation in generations]
        self._origin.on_cancel(self._cancel)
        if not generations:
            self._answer()
        for row, generation in zip(self._rows, generations, strict=True):
            if not self._is_over and (stream := self._lane.open(generation, row)) is not None:
                self._streams.append(stream)

    def _row_finished(self) -> None:
        self._num_missing -= 1
        if not self._num_missing and not self._is_over:
            self._answer()

    def _row_failed(self, error: TensorwayError) -> None:
        """The failure of one is that of all: the others are not wanted any more."""
        if not self._is_over:
            self._cancel()
            self._origin.fail(error)

    def _answer(self) -> None:
        self._is_over = True
        now_s = time.monotonic()
        sent_s = max((stream.sent_s for stream in self._streams), default=now_s)
        head, payload = text_wire.write_texts([row.text for row in self._rows], self._lane.spec, self._arrived_s, sent_s, now_s)
        self._origin.reply(head, payload)

    def _cancel(self) -> None:
        self._is_over = True
        for row in self._rows:
            row.cancel()


@dataclass(slots=True, eq=False)
class _Row:
    """See `tensorway.transport.port.Exchange`: reads all at once, and gathers."""

    head: bytes
    deadline: Deadline
    finished: Callable[[], None]
    failed: Callable[[TensorwayError], None]
    payload: Payload = ()
    text: FinishedText = field(default_factory=FinishedText)
    _on_cancel: list[Callable[[], None]] = field(default_factory=list)
    _is_over: bool = False

    @property
    def credit(self) -> int:
        return TOKEN_CREDIT

    def push(self, head: bytes) -> None:
        text_wire.gather(head, self.text)

    def on_credit(self, callback: Callable[[], None]) -> None:
        """There always is some."""

    def on_cancel(self, callback: Callable[[], None]) -> None:
        self._on_cancel.append(callback)

    def reply(self, head: bytes, payload: Payload) -> None:
        self._is_over = True
        self.finished()

    def fail(self, error: TensorwayError) -> None:
        self._is_over = True
        self.failed(error)

    def cancel(self) -> None:
        """Nobody waits for this row."""
        if not self._is_over:
            self._is_over = True
            for callback in self._on_cancel:
                callback()

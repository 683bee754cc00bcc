"""The lane of one revision that generates: its streams, and their choices on the way to groups and back. Acts on what the pure modules
decide."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from tensorway.deadline import Deadline
from tensorway.errors import Cancelled, DeadlineExceeded, InvalidRequest, Overloaded, TensorwayError, Unavailable
from tensorway.generation import GenerationLimits
from tensorway.signature import RevisionSpec
from tensorway.transport.port import Exchange
from tensorway_orchestrator import generation_wire
from tensorway_orchestrator.admission import HeldBytes, no_group
from tensorway_orchestrator.attempt import Attempt
from tensorway_orchestrator.choice_queue import ChoiceQueue
from tensorway_orchestrator.generation_admission import GenerationLoad, refusal
from tensorway_orchestrator.load import LaneMeter
from tensorway_orchestrator.metrics import StreamMetrics
from tensorway_orchestrator.places import GroupPlaces
from tensorway_orchestrator.pool import Group
from tensorway_orchestrator.retry import RetryBudget, RetryPolicy
from tensorway_orchestrator.standing import Failure
from tensorway_orchestrator.stream_table import StreamTable
from tensorway_orchestrator.streams import Choice, Generation, Stream, open_stream
from tensorway_orchestrator.survival import Loss, verdict

#: A leader that is full is left alone for at least this long.
_MIN_REST_S: Final = 0.005
_ATTEMPT_IDS: Final = count(1)


@dataclass(slots=True, eq=False)
class GenerationLane:
    """One revision. All methods run in the loop and none of them waits."""

    spec: RevisionSpec
    limits: GenerationLimits
    policy: RetryPolicy
    #: How long streams that have no token yet wait for a group while none lives, seconds. Others wait until their deadline.
    group_wait_s: float
    metrics: StreamMetrics
    held: HeldBytes
    meter: LaneMeter
    table: StreamTable
    #: Where this orchestrator runs; "" for nowhere in particular.
    zone: str = ""
    budget: RetryBudget = field(init=False)
    places: GroupPlaces = field(init=False)
    queue: ChoiceQueue = field(default_factory=ChoiceQueue)
    #: Streams that have a reader.
    streams: set[Stream] = field(default_factory=set)
    _is_closed: bool = False

    def __post_init__(self) -> None:
        self.budget = RetryBudget(self.policy.covering(self.limits.max_sequences))
        self.places = GroupPlaces(self.limits.max_sequences, self.group_wait_s, self.zone, self.pump, self._give_up)

    @property
    def groups(self) -> dict[str, Group]:
        return self.places.groups

    @property
    def num_open(self) -> int:
        """Streams that have a reader."""
        return len(self.streams)

    def start(self) -> None:
        """Begins the wait for a first group."""
        self.places.wait.missing(is_registered=False)

    def open(self, generation: Generation, origin: Exchange) -> Stream | None:
        """Begins a stream, or goes on with one of another orchestrator. Where it may not begin, `origin` is told why, and there is none."""
        now_s = time.monotonic()
        self.meter.arrived(generation.num_choices, now_s)
        refused = refusal(generation, origin.deadline.at_s, self.spec, self._load(now_s), now_s)
        if refused is not None:
            self.metrics.failed(refused.status.name)
            origin.fail(refused)
            return None
        self.budget.deposit()
        stream = open_stream(generation, now_s, origin.deadline.at_s)
        if not generation.so_far:
            stream.log.offer(generation_wire.started(generation, self.spec))
        self.table.add(self, stream)
        self._attach(stream, origin)
        return stream

    def resume(self, stream: Stream, origin: Exchange) -> None:
        """See `StreamOwner`."""
        self.metrics.resumed()
        previous = stream.origin
        if previous is None:
            self.table.take(stream)
        else:
            self._leave(stream)
            previous.fail(Cancelled(f"stream {stream.id!r} was taken over by another call"))
        self._attach(stream, origin)

    def group_changed(self, group: Group, is_gone: bool) -> None:
        """A group connected, broke, leaves or is gone."""
        self.places.changed(group, is_gone)

    def pump(self) -> None:
        """Sends choices for as long as a group has a place."""
        while (choice := self.queue.peek()) is not None:
            group = self.places.choose(choice.stream.generation.blocks, choice.record.lost_on)
            if group is None:
                return
            self.queue.withdraw(choice)
            self._send(choice, group)

    def close(self) -> None:
        """The revision is withdrawn: what groups have may end, what waits is answered."""
        self._is_closed = True
        self.places.close()
        self.table.drop_parked_of(self)
        for stream in tuple(self.streams):
            if any(choice.ticket for choice in stream.choices):
                self._fail(stream, self._withdrawn())

    def token(self, attempt: Attempt, head: bytes) -> None:
        """See `AttemptListener`."""
        choice, stream = attempt.choice, attempt.choice.stream
        try:
            piece = generation_wire.read_piece(head, choice.index)
            pieces = choice.take(piece)
        except InvalidRequest as error:
            attempt.cancel()
            self.ended(attempt, Unavailable(f"group {attempt.group.id} broke off: {error}"))
            return
        if num_tokens := len(piece.token_ids):
            self.metrics.said(num_tokens, choice.gap_s(time.monotonic()))
        if (num_tokens or piece.is_finished) and not attempt.has_progressed:
            attempt.has_progressed = True
            choice.record.progressed()
        if piece.is_finished:
            piece.sign(choice.record.num_attempts, attempt.group.id)
        are_sent = [stream.say(each) for each in pieces]
        # Not before: a flush ends a stream whose choices are finished.
        if not all(are_sent):
            self._flush(stream)

    def ended(self, attempt: Attempt, error: TensorwayError | None) -> None:
        """See `AttemptListener`."""
        choice, now_s = attempt.choice, time.monotonic()
        choice.attempt = choice.held = None
        self.meter.answered(1, now_s - attempt.sent_s, choice.stream.sent_s - choice.stream.arrived_s, now_s)
        if choice.transcript.is_finished:
            attempt.sending.roster.answered(attempt.sending.batch, now_s)
        else:
            self._lost(attempt, error or Unavailable(f"group {attempt.group.id} ended an answer without `finished`"), now_s)
        self.pump()

    def _lost(self, attempt: Attempt, error: TensorwayError, now_s: float) -> None:
        """The group did not finish the choice: another attempt, or the end of the stream."""
        choice, group = attempt.choice, attempt.group
        stream, record = choice.stream, choice.record
        if isinstance(error, Overloaded):
            # No attempt: it was not even begun.
            record.num_attempts -= not attempt.has_progressed
            self.places.rest(group, max(_MIN_REST_S, error.retry_after_s), now_s)
        elif not (isinstance(error, DeadlineExceeded) and attempt.deadline_s < stream.deadline_s):
            # A deadline that was the last reader's is none.
            if isinstance(error, Unavailable):
                attempt.sending.roster.failed(attempt.sending.batch, Failure.LOST, now_s)
            loss = Loss(group.id, error, group.has_died, attempt.has_progressed)
            failed = verdict(record, loss, stream.deadline_s, now_s, self.policy, self.budget)
            if failed is not None:
                self._fail(stream, failed)
                return
            self.metrics.restarted()
            if group.link.is_connected:
                self.places.rest(group, record.rest_s, now_s)
        if self._is_closed:
            self._fail(stream, self._withdrawn())
        else:
            self.queue.offer(choice)

    def _send(self, choice: Choice, group: Group) -> None:
        now_s = time.monotonic()
        stream, record = choice.stream, choice.record
        record.num_attempts += 1
        attempt = Attempt(self, group, choice, now_s, stream.deadline_s)
        span = None if attempt.span is None else attempt.span.context
        head = generation_wire.write_attempt(next(_ATTEMPT_IDS), group.epoch, choice, stream.deadline_s - now_s, span)
        try:
            attempt.link_id = group.link.send(head, (), Deadline(stream.deadline_s), attempt)
        except Unavailable:
            # The link does not take it: that was no attempt.
            attempt.cancel()
            record.num_attempts -= 1
            self.places.rest(group, record.rest_s, now_s)
            self.queue.offer(choice)
            return
        choice.attempt = attempt
        if not stream.sent_s:
            stream.sent_s = now_s
            self.metrics.sent(now_s - stream.arrived_s)
        self.places.sent(group, stream.generation.blocks)

    def _load(self, now_s: float) -> GenerationLoad:
        places = self.places
        return GenerationLoad(
            places.num_free, self.queue.num_waiting, self.limits.max_waiting, places.num_places, self.meter.step_s, self.held,
            places.wait.is_over(now_s),
        )

    def _attach(self, stream: Stream, origin: Exchange) -> None:
        """From here on `origin` is the stream's reader."""
        stream.origin, stream.deadline_s = origin, origin.deadline.at_s
        self.streams.add(stream)
        self.held.total += len(stream.generation.head)
        loop = asyncio.get_running_loop()
        stream.stop_timer = loop.call_later(max(0.0, origin.deadline.remaining_s()), self._expire, stream).cancel
        origin.on_credit(lambda: self._credited(stream, origin))
        origin.on_cancel(lambda: self._vanished(stream, origin))
        for choice in stream.choices:
            if not choice.transcript.is_finished and choice.attempt is None and not choice.ticket:
                self.queue.offer(choice)
        self._flush(stream)
        self.pump()

    def _leave(self, stream: Stream) -> None:
        """The stream has no reader from here on."""
        self.streams.discard(stream)
        self.held.total -= len(stream.generation.head)
        if stream.stop_timer is not None:
            stream.stop_timer()
        stream.origin = stream.stop_timer = None

    def _stop(self, stream: Stream) -> None:
        """Nobody works on the stream from here on; the places that it had are free."""
        for choice in stream.choices:
            self.queue.withdraw(choice)
            choice.stop()

    def _credited(self, stream: Stream, origin: Exchange) -> None:
        if stream.origin is origin:
            self._flush(stream)

    def _flush(self, stream: Stream) -> None:
        if stream.flush():
            self.metrics.answered()
            self._leave(stream)
            # The reader may have lost the end on its way.
            self.table.park(stream)

    def _vanished(self, stream: Stream, origin: Exchange) -> None:
        """The reader cancelled, or its connection broke: its places are free at once, and it may come back."""
        if stream.origin is not origin:
            return
        self.metrics.failed("CANCELLED")
        self._leave(stream)
        self._stop(stream)
        if time.monotonic() < stream.deadline_s and not self._is_closed:
            self.table.park(stream)
        else:
            self.table.drop(stream)
        self.pump()

    def _expire(self, stream: Stream) -> None:
        """The deadline has passed, wherever the stream's choices are."""
        attempts = max(choice.record.num_attempts for choice in stream.choices)
        where, hop = "in the queue", "orchestrator"
        if stream.is_finished:
            where, hop = "while its reader took what was said", "client"
        elif stream.is_running:
            where, hop = f"while a group ran it (attempt {attempts})", "group"
        elif attempts:
            where = f"while it waited for a group to go on with it (after attempt {attempts})"
        self._fail(stream, DeadlineExceeded(
            f"the deadline of request {stream.generation.request_id!r} for model {self.spec.model!r} passed {where}", hop=hop
        ))
        self.pump()

    def _fail(self, stream: Stream, error: TensorwayError) -> None:
        """Ends a stream for good."""
        origin = stream.origin
        self._leave(stream)
        self._stop(stream)
        self.table.drop(stream)
        self.metrics.failed(error.status.name)
        if origin is not None:
            origin.fail(error)

    def _withdrawn(self) -> Unavailable:
        return Unavailable(f"model {self.spec.model!r} revision {self.spec.revision[:12]} was withdrawn")

    def _give_up(self) -> None:
        """No group has come in time: what has a token waits on."""
        for stream in tuple(self.streams):
            if not stream.has_begun and not stream.is_running:
                self._fail(stream, no_group(self.spec))

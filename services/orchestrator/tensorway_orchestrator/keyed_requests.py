"""Requests with an idempotency key: each key is run once, and everybody who asks with it gets that run's outcome."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tensorway.deadline import Deadline
from tensorway.errors import Cancelled, DeadlineExceeded, InternalError, InvalidRequest, TensorwayError
from tensorway.transport.port import Exchange, Payload, Reply
from tensorway_orchestrator import wire
from tensorway_orchestrator.idempotency import KeyTable
from tensorway_orchestrator.metrics import OrchestratorMetrics

#: Longest key, characters.
MAX_KEY_CHARS = 256

#: What a key was answered with: for all time, as far as it is remembered.
Outcome = Reply | TensorwayError
#: Runs a request; its exchange gets the outcome.
Run = Callable[[Exchange], None]


class KeyedRequests:
    """All keys of this orchestrator. Lives in the loop."""

    def __init__(self, retention_s: float, max_bytes: int, metrics: OrchestratorMetrics) -> None:
        self._table: KeyTable[Exchange, Outcome] = KeyTable(retention_s, max_bytes)
        self._metrics = metrics

    def take(self, envelope: wire.Envelope, exchange: Exchange, run: Run) -> None:
        """Runs the request, unless its key runs already or is answered. Raises InvalidRequest for a key that is too long, or was used for
        something else."""
        key = envelope.head.idempotency_key
        if len(key) > MAX_KEY_CHARS:
            raise InvalidRequest(f"idempotency_key: has {len(key)} characters, more than {MAX_KEY_CHARS}", field="idempotency_key")
        scoped, fingerprint = f"{envelope.model}\0{key}", wire.fingerprint(exchange.head, exchange.payload)
        known = self._table.find(scoped, time.monotonic())
        if known is None:
            self._begin(scoped, fingerprint, exchange, run)
            return
        if known.fingerprint != fingerprint:
            raise InvalidRequest(
                f"idempotency_key: {key!r} was used for another request; use a new key for new content", field="idempotency_key"
            )
        self._metrics.model(envelope.model).num_repeats += 1
        if known.outcome is not None:
            _tell(exchange, known.outcome)
        else:
            self._wait(known.waiters, exchange)

    def _begin(self, key: str, fingerprint: str, exchange: Exchange, run: Run) -> None:
        keyed = self._table.begin(key, fingerprint)
        self._wait(keyed.waiters, exchange)

        def ended(outcome: Outcome) -> None:
            self._ended(key, fingerprint, outcome, run, exchange)

        keyed_run = _KeyedRun(exchange.head, exchange.payload, exchange.deadline, ended)
        try:
            run(keyed_run)
        except TensorwayError as error:
            keyed_run.fail(error)

    def _wait(self, waiters: list[Exchange], exchange: Exchange) -> None:
        waiters.append(exchange)
        # Nobody may be left: the run goes on, for whoever asks next.
        exchange.on_cancel(lambda: waiters.remove(exchange) if exchange in waiters else None)

    def _ended(self, key: str, fingerprint: str, outcome: Outcome, run: Run, first: Exchange) -> None:
        if isinstance(outcome, TensorwayError) and (outcome.is_retryable or isinstance(outcome, DeadlineExceeded | Cancelled)):
            waiters = self._table.dropped(key)
            if isinstance(outcome, DeadlineExceeded):
                # It was the first one's deadline; who asked later may have time left.
                waiters = self._run_for_the_patient(key, fingerprint, waiters, run, first)
        else:
            num_bytes = sum(map(len, outcome.payload)) + len(outcome.head) if isinstance(outcome, Reply) else 0
            waiters = self._table.answered(key, outcome, num_bytes, time.monotonic())
        for waiter in waiters:
            _tell(waiter, outcome)

    def _run_for_the_patient(self, key: str, fingerprint: str, waiters: list[Exchange], run: Run, first: Exchange) -> list[Exchange]:
        """Begins again for those whose deadline has not come, but for the `first`, whose run it was and who may have left; returns the
        others."""
        patient = [waiter for waiter in waiters if waiter is not first and waiter.deadline.remaining_s() > 0.0]
        for number, waiter in enumerate(patient):
            known = self._table.find(key, time.monotonic())
            if number == 0 or known is None:
                self._begin(key, fingerprint, waiter, run)
            elif known.outcome is not None:
                _tell(waiter, known.outcome)
            else:
                self._wait(known.waiters, waiter)
        return [waiter for waiter in waiters if waiter not in patient]


@dataclass(slots=True, eq=False)
class _KeyedRun:
    """The exchange of a run (see `tensorway.transport.port.Exchange`). It outlives whoever asked for it, up to its deadline."""

    head: bytes
    payload: Payload
    deadline: Deadline
    ended: Callable[[Outcome], None]
    _is_over: bool = field(default=False)

    @property
    def credit(self) -> int:
        return 0

    def push(self, head: bytes) -> None:
        raise InternalError("a token is pushed to a request that is answered in one piece")

    def on_credit(self, callback: Callable[[], None]) -> None:
        """Never comes."""

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Nobody cancels a run."""

    def reply(self, head: bytes, payload: Payload) -> None:
        self._end(Reply(head, payload))

    def fail(self, error: TensorwayError) -> None:
        self._end(error)

    def _end(self, outcome: Outcome) -> None:
        if not self._is_over:
            self._is_over = True
            self.ended(outcome)


def _tell(exchange: Exchange, outcome: Outcome) -> None:
    if isinstance(outcome, Reply):
        exchange.reply(outcome.head, outcome.payload)
    else:
        exchange.fail(outcome)

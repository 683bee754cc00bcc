"""Another model or revision answers when the one that was asked cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from tensorway.deadline import Deadline
from tensorway.errors import DeadlineExceeded, NotFound, Overloaded, TensorwayError, Unavailable
from tensorway.resilience import Fallback
from tensorway.signature import RevisionSpec, TensorSpec
from tensorway.transport.port import Exchange, Payload
from tensorway_orchestrator import wire

_LOG = logging.getLogger(__name__)
#: Models that may be asked for one request, the first included.
_MAX_MODELS: Final = 4


@dataclass(frozen=True, slots=True)
class Handover:
    """What a fallback needs of the rest."""

    #: The revision meant by a model's name and a revision, a prefix of one, or "". Raises NotFound.
    find: Callable[[Fallback], RevisionSpec]
    #: Offers an exchange to the lane of a revision.
    offer: Callable[[wire.Envelope, Exchange], None]
    #: Counts a request of the model that is handed on.
    count: Callable[[str], None]


@dataclass(slots=True, eq=False)
class FallbackExchange:
    """An exchange whose failure may be another's to mend; see `tensorway.transport.port.Exchange`."""

    origin: Exchange
    spec: RevisionSpec
    handover: Handover
    #: Revisions that were asked before this one.
    asked: tuple[str, ...] = ()
    head: bytes = field(init=False)
    _has_begun: bool = False

    def __post_init__(self) -> None:
        self.head = self.origin.head

    @property
    def payload(self) -> Payload:
        return self.origin.payload

    @property
    def deadline(self) -> Deadline:
        return self.origin.deadline

    @property
    def credit(self) -> int:
        return self.origin.credit

    def push(self, head: bytes) -> None:
        self._has_begun = True
        self.origin.push(head)

    def on_credit(self, callback: Callable[[], None]) -> None:
        self.origin.on_credit(callback)

    def on_cancel(self, callback: Callable[[], None]) -> None:
        self.origin.on_cancel(callback)

    def reply(self, head: bytes, payload: Payload) -> None:
        """Where this is a fallback's answer, it says so."""
        self.origin.reply(wire.name_model(head, self.spec.model) if self.asked and head else head, payload)

    def fail(self, error: TensorwayError) -> None:
        rule = self.spec.fallback
        if rule is None or self._has_begun or not _may_another(error, self.deadline) or len(self.asked) + 1 >= _MAX_MODELS:
            self.origin.fail(error)
            return
        try:
            self._hand_on(rule, error)
        except TensorwayError as failed:
            fields = wire.log_fields(self.head)
            _LOG.warning("model %s cannot answer, nor can its fallback: %s", self.spec.model, failed, extra={"fields": fields})
            self.origin.fail(error)

    def _hand_on(self, rule: Fallback, error: TensorwayError) -> None:
        """Raises what keeps the fallback from being asked."""
        spec = self.handover.find(rule)
        asked = (*self.asked, self.spec.revision)
        if spec.revision in asked:
            raise NotFound(f"fallback: model {spec.model!r} has been asked already", field="fallback")
        if not _fits(self.spec, spec):
            raise NotFound(f"fallback: model {spec.model!r} takes or returns other tensors than {self.spec.model!r}", field="fallback")
        if _LOG.isEnabledFor(logging.DEBUG):
            fields = wire.log_fields(self.head)
            _LOG.debug("model %s hands a request on to %s: %s", self.spec.model, spec.model, error, extra={"fields": fields})
        self.handover.count(self.spec.model)
        envelope = wire.readdressed(self.head, spec.model, spec.revision)
        exchange = FallbackExchange(self.origin, spec, self.handover, asked)
        exchange.head = envelope.head.SerializeToString()
        self.handover.offer(envelope, exchange)


def _may_another(error: TensorwayError, deadline: Deadline) -> bool:
    """Whether the error says that this model cannot now: not that the request is wrong, nor that its time is over."""
    if deadline.remaining_s() <= 0.0:
        return False
    return isinstance(error, Unavailable | Overloaded) or (isinstance(error, DeadlineExceeded) and error.retry_after_s > 0.0)


def _fits(asked: RevisionSpec, other: RevisionSpec) -> bool:
    """Whether a request for one can be put to the other; lengths are the leader's to judge."""

    def outline(specs: tuple[TensorSpec, ...]) -> set[tuple[str, int, int]]:
        return {(spec.name, int(spec.dtype), len(spec.shape)) for spec in specs}

    ours, theirs = asked.signature, other.signature
    return outline(ours.inputs) == outline(theirs.inputs) and outline(ours.outputs) == outline(theirs.outputs) and (
        (asked.generation is None) == (other.generation is None)
    )

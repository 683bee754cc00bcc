"""Finds the lane of every request, and keeps the lanes as the registry says."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping

from pydantic import ValidationError

from tensorway.errors import FailedPrecondition, NotFound, TensorwayError
from tensorway.generation import GenerationLimits
from tensorway.loads import ModelLoad
from tensorway.registry.port import DESIRED, REVISIONS, Registry
from tensorway.resilience import Fallback
from tensorway.revisions import decode_revision
from tensorway.signature import RevisionSpec
from tensorway.telemetry.tracing import NO_TRACER, Tracer
from tensorway.transport.port import Exchange
from tensorway_orchestrator import generation_wire, wire
from tensorway_orchestrator.admission import HeldBytes
from tensorway_orchestrator.batching import BatchLimits, ShapeRule
from tensorway_orchestrator.fallback import FallbackExchange, Handover
from tensorway_orchestrator.generation_lane import GenerationLane
from tensorway_orchestrator.group_wait import GroupWait
from tensorway_orchestrator.keyed_requests import KeyedRequests
from tensorway_orchestrator.lane import Lane
from tensorway_orchestrator.lane_load import read_load
from tensorway_orchestrator.load import LaneMeter
from tensorway_orchestrator.metrics import LaneLevel, OrchestratorMetrics
from tensorway_orchestrator.pool import Group
from tensorway_orchestrator.quarantine import Quarantines
from tensorway_orchestrator.retention import Retention
from tensorway_orchestrator.retry import RetryPolicy
from tensorway_orchestrator.roster import Roster
from tensorway_orchestrator.settings import OrchestratorSettings
from tensorway_orchestrator.stream_table import StreamTable
from tensorway_orchestrator.whole_texts import WholeTexts

_LOG = logging.getLogger(__name__)


class Dispatcher:
    """One lane per known revision. `on_exchange` is the link's handler."""

    def __init__(self, settings: OrchestratorSettings, metrics: OrchestratorMetrics, tracer: Tracer = NO_TRACER) -> None:
        self._settings = settings
        self._tracer = tracer
        self._metrics = metrics
        self._policy = RetryPolicy(max_attempts=settings.max_attempts)
        self._held = HeldBytes(settings.max_queue_bytes)
        self._streams = StreamTable(
            Retention(settings.stream_retention_s, settings.max_parked_streams, settings.max_parked_bytes), metrics, tracer
        )
        self._keys = KeyedRequests(settings.answer_retention_s, settings.max_kept_answer_bytes, metrics)
        self._handover = Handover(self._find, self._enter, self._count_fallback)
        self._lanes: dict[tuple[str, str], Lane | GenerationLane] = {}
        #: What no revision runs again.
        self.quarantines = Quarantines()
        metrics.levels = self.levels
        #: Model -> revision that serves.
        self._serving: dict[str, str] = {}
        #: Model -> replicas that are wanted of it.
        self._wanted: dict[str, int] = {}
        #: Set when a request comes for a model that has no replica and may have one.
        self.called = asyncio.Event()
        #: Groups seen before their revision's document.
        self._early: dict[str, Group] = {}
        self._documents: Mapping[str, bytes] = {}

    @property
    def held_bytes(self) -> int:
        """Tensor bytes of all open requests."""
        return self._held.total

    @property
    def num_open(self) -> int:
        """Requests that are not answered, and streams that have a reader."""
        return sum(lane.num_open for lane in self._lanes.values())

    def levels(self) -> list[LaneLevel]:
        """How much is open in each lane."""
        return [
            LaneLevel(lane.spec.model, lane.num_open, queued_rows=lane.queue.num_rows) if isinstance(lane, Lane)
            else LaneLevel(lane.spec.model, lane.num_open, num_streams=lane.num_open, num_waiting_choices=lane.queue.num_waiting)
            for lane in self._lanes.values()
        ]

    def rosters(self) -> list[tuple[str, Roster]]:
        """The model and the roster of each lane."""
        return [(lane.spec.model, lane.roster if isinstance(lane, Lane) else lane.places.roster) for lane in self._lanes.values()]

    def on_exchange(self, exchange: Exchange) -> None:
        """Queues one request, or answers why not. Neither blocks nor raises."""
        try:
            self._offer(wire.read_envelope(exchange.head), exchange)
        except TensorwayError as error:
            exchange.fail(error)

    def _offer(self, envelope: wire.Envelope, exchange: Exchange) -> None:
        resume = envelope.resume
        if resume is not None:
            self._streams.resume(resume[0], exchange, resume[1], envelope.head.traceparent)
        elif envelope.head.idempotency_key and not envelope.is_generation:
            self._keys.take(envelope, exchange, lambda run: self._run(envelope, run))
        else:
            self._run(envelope, exchange)

    def _run(self, envelope: wire.Envelope, exchange: Exchange) -> None:
        spec = self.lane(envelope.model, envelope.revision).spec
        self._enter(envelope, exchange if spec.fallback is None else FallbackExchange(exchange, spec, self._handover))

    def _enter(self, envelope: wire.Envelope, exchange: Exchange) -> None:
        lane = self.lane(envelope.model, envelope.revision)
        if isinstance(lane, GenerationLane):
            self._generate(lane, envelope, exchange)
        elif envelope.is_generation:
            raise FailedPrecondition(f"model {lane.spec.model!r} does not generate; use Infer", field="model")
        else:
            lane.offer(wire.read_request(envelope, exchange, lane.rule, time.monotonic(), self._tracer))

    def _generate(self, lane: GenerationLane, envelope: wire.Envelope, exchange: Exchange) -> None:
        if envelope.is_explanation:
            raise FailedPrecondition(f"model {lane.spec.model!r} generates, which is not explained; use Generate or Infer", field="model")
        if not envelope.is_generation:
            WholeTexts(lane, exchange, envelope.head, self._tracer).start()
            return
        generation = generation_wire.read_generation(envelope.head, exchange.head, self._tracer)
        found = self._streams.find(generation.stream_id)
        if found is not None and found[1].log.base <= generation.next_sequence <= found[1].log.end:
            # Only the link to this orchestrator was lost, not what it knew.
            self._streams.resume(generation.stream_id, exchange, generation.next_sequence)
        else:
            lane.open(generation, exchange)

    def lane(self, model: str, revision: str) -> Lane | GenerationLane:
        """The lane of a revision, or of the one that serves. Raises NotFound."""
        serving = revision or self._serving.get(model, "")
        lane = self._lanes.get((model, serving))
        if lane is None:
            known = ", ".join(sorted({name for name, _ in self._lanes})) or "none"
            wanted = f"model {model!r}" + (f" revision {revision[:12]!r}" if revision else "")
            raise NotFound(f"{wanted} is unknown here; models known: {known}", field="model")
        return lane

    def _count_fallback(self, model: str) -> None:
        self._metrics.model(model).num_fallbacks += 1

    def _find(self, rule: Fallback) -> RevisionSpec:
        """See `Handover`."""
        of_model = [revision for model, revision in self._lanes if model == rule.model]
        found = [revision for revision in of_model if rule.revision and revision.startswith(rule.revision)]
        if len(found) > 1:
            raise NotFound(f"fallback: revision {rule.revision!r} fits several of model {rule.model!r}", field="fallback")
        return self.lane(rule.model, found[0] if found else rule.revision).spec

    def knows(self, model: str) -> bool:
        """True once requests for the model, without a revision, find their lane."""
        return (model, self._serving.get(model, "")) in self._lanes

    @property
    def has_dormant(self) -> bool:
        """Whether a model has no group because no request came for long, or is only starting again: such a model can be asked."""
        return any(_wait_of(lane).is_patient for lane in self._lanes.values())

    def serving_specs(self) -> dict[str, RevisionSpec]:
        """Of every model whose serving revision has a lane, by model."""
        return {model: lane.spec for model, revision in self._serving.items() if (lane := self._lanes.get((model, revision))) is not None}

    def loads(self, now_s: float) -> tuple[ModelLoad, ...]:
        """Of all models that are wanted, by name."""
        return tuple(read_load(self._lanes[model, self._serving[model]], now_s) for model in sorted(self.serving_specs()))

    def wanted(self, model: str) -> int:
        """Replicas of a model that are wanted."""
        return self._wanted.get(model, 0)

    def group_changed(self, group: Group, is_gone: bool) -> None:
        """The pool's listener."""
        lane = self._lanes.get((group.model, group.revision))
        if lane is not None:
            lane.group_changed(group, is_gone)
        elif is_gone:
            self._early.pop(group.id, None)
        else:
            self._early[group.id] = group

    async def follow_revisions(self, registry: Registry) -> None:
        """Opens and closes lanes with the documents of revisions, until cancelled."""
        async for documents in registry.watch_documents(REVISIONS):
            for key in self._documents.keys() - documents.keys():
                self._close_lane(key)
            for key, document in documents.items():
                if self._documents.get(key) != document:
                    self._open_lane(key, document)
            self._documents = documents

    async def follow_desired(self, registry: Registry, on_change: Callable[[], None] = lambda: None) -> None:
        """Learns which revision of each model serves and how many replicas it should have, until cancelled."""
        async for documents in registry.watch_documents(DESIRED):
            serving: dict[str, str] = {}
            wanted: dict[str, int] = {}
            for key, document in documents.items():
                try:
                    wish = json.loads(document)
                    model, revision, num_replicas = str(wish["model"]), str(wish["revision"]), int(wish["replicas"])
                except (ValueError, KeyError, TypeError) as error:
                    _LOG.error("document %s is no desired state and is ignored: %s", key, error)
                else:
                    serving[model], wanted[model] = revision, num_replicas
            self._serving, self._wanted = serving, wanted
            for lane in self._lanes.values():
                self._tell_dormant(lane)
            on_change()

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()
        self._streams.close()

    def _open_lane(self, key: str, document: bytes) -> None:
        try:
            spec = decode_revision(document)
        except ValidationError as error:
            _LOG.error("document %s is no revision and is ignored: %s", key, error)
            return
        identity = (spec.model, spec.revision)
        if identity in self._lanes:
            return  # a revision never changes
        lane = self._lanes[identity] = self._new_lane(spec)
        self._tell_dormant(lane)
        for group in tuple(self._early.values()):
            if (group.model, group.revision) == identity:
                del self._early[group.id]
                lane.group_changed(group, False)

    def _new_lane(self, spec: RevisionSpec) -> Lane | GenerationLane:
        if spec.generation is not None:
            return self._new_generation_lane(spec, spec.generation)
        settings = self._settings
        lane = Lane(
            spec=spec,
            limits=BatchLimits.of(spec, settings.max_batch_bytes),
            rule=ShapeRule.of(spec.signature, spec.batching),
            policy=self._policy,
            group_wait_s=_group_wait_s(spec, settings),
            metrics=self._metrics.lane(spec.model),
            held=self._held,
            meter=LaneMeter.of(spec, time.monotonic(), self.called.set),
            zone=settings.zone,
            quarantine=self.quarantines.of(spec.model, spec.revision),
        )
        lane.start()
        return lane

    def _new_generation_lane(self, spec: RevisionSpec, limits: GenerationLimits) -> GenerationLane:
        metrics = self._metrics
        lane = GenerationLane(
            spec=spec,
            limits=limits,
            policy=self._policy,
            group_wait_s=_group_wait_s(spec, self._settings),
            metrics=metrics.streams(spec.model),
            held=self._held,
            meter=LaneMeter.of(spec, time.monotonic(), self.called.set),
            table=self._streams,
            zone=self._settings.zone,
        )
        lane.start()
        return lane

    def _is_dormant(self, spec: RevisionSpec) -> bool:
        wanted = self._wanted.get(spec.model)
        return spec.scaling is not None and wanted == 0 and self._serving.get(spec.model) == spec.revision

    def _tell_dormant(self, lane: Lane | GenerationLane) -> None:
        is_dormant = self._is_dormant(lane.spec)
        lane.meter.cool(is_dormant)
        _wait_of(lane).dormant(is_dormant)

    def _close_lane(self, key: str) -> None:
        model, _, revision = key.removeprefix(REVISIONS).rpartition("/")
        lane = self._lanes.pop((model, revision), None)
        if lane is not None:
            self._early.update(lane.groups)
            lane.close()


def _wait_of(lane: Lane | GenerationLane) -> GroupWait:
    return lane.places.wait if isinstance(lane, GenerationLane) else lane.wait


def _group_wait_s(spec: RevisionSpec, settings: OrchestratorSettings) -> float:
    """Where another may answer, nobody waits for a group."""
    return settings.group_wait_s if spec.fallback is None else 0.0

"""Keeps the number of replicas of each model that says `scaling`: one orchestrator for each model, whoever holds its claim."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import ValidationError

from tensorway.errors import TensorwayError
from tensorway.loads import LOADS, ModelLoad, decode_loads
from tensorway.registry.amending import amend
from tensorway.registry.patience import released
from tensorway.registry.port import DESIRED, GROUP, ORCHESTRATOR, Lease, Registry
from tensorway.resilience import Scaling
from tensorway.signature import RevisionSpec
from tensorway_orchestrator.outage import Outage
from tensorway_orchestrator.scaling import Scale, demand_of

_LOG = logging.getLogger(__name__)
#: Claim key prefix: `scaler/MODEL`.
SCALER: Final = "scaler/"
#: How often it is decided when nothing changes: calm is a matter of time, seconds.
_EVERY_S: Final = 1.0


@dataclass(slots=True)
class _View:
    """What the registry says."""

    #: Loads by orchestrator, and when they were heard.
    loads: dict[str, tuple[tuple[ModelLoad, ...], float]] = field(default_factory=dict)
    documents: dict[str, bytes] = field(default_factory=dict)
    orchestrators: frozenset[str] = frozenset()
    #: Wanted (revision, replicas) by model.
    desired: dict[str, tuple[str, int]] = field(default_factory=dict)
    #: Live groups by (model, revision).
    ready: Counter[tuple[str, str]] = field(default_factory=Counter)
    #: Claims that anybody holds; None until they have been read.
    claimed: frozenset[str] | None = None


@dataclass(slots=True, eq=False)
class _Charge:
    """A model whose claim is held here."""

    lease: Lease
    scale: Scale
    losing: asyncio.Task[None]


class Scaler:
    """Decides and writes `desired/MODEL`, until cancelled. No outage of the registry ends it."""

    def __init__(self, orchestrator: str, registry: Registry, specs: Callable[[], Mapping[str, RevisionSpec]]) -> None:
        """`specs` tells the serving revision of every model, by model."""
        self._orchestrator = orchestrator
        self._registry = registry
        self._specs = specs
        self._view = _View()
        self._changed = asyncio.Event()
        self._charges: dict[str, _Charge] = {}
        self._outage = Outage("scaling")

    async def run(self) -> None:
        """Until cancelled; then lets another orchestrator decide."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow_loads(), name="loads")
                tasks.create_task(self._follow_orchestrators(), name="orchestrators")
                tasks.create_task(self._follow_desired(), name="desired state")
                tasks.create_task(self._follow_groups(), name="groups")
                tasks.create_task(self._follow_claims(), name="scaler claims")
                while True:
                    await self._decide(tasks)
                    try:
                        async with asyncio.timeout(_EVERY_S):
                            await self._changed.wait()
                    except TimeoutError:
                        continue
                    self._changed.clear()
        finally:
            for charge in tuple(self._charges.values()):
                await released(charge.lease)

    async def _decide(self, tasks: asyncio.TaskGroup) -> None:
        """Looks at every model that scales, and keeps the claims of those only."""
        specs = {model: spec for model, spec in self._specs().items() if spec.scaling is not None}
        for model in self._charges.keys() - specs.keys():
            await self._give_up(model)
        try:
            for model, spec in specs.items():
                assert spec.scaling is not None
                charge = self._charges.get(model) or await self._take(model, spec.scaling, tasks)
                if charge is not None:
                    await self._scale(spec, charge)
        except TensorwayError as error:
            self._outage.began(error)
            # What came meanwhile was not heard of: nothing counts as idle before it was listened to again.
            for charge in self._charges.values():
                charge.scale.since_s = time.monotonic()
        else:
            self._outage.ended()

    async def _take(self, model: str, rule: Scaling, tasks: asyncio.TaskGroup) -> _Charge | None:
        """The model's claim, where nobody has it."""
        claimed, key = self._view.claimed, f"{SCALER}{model}"
        if claimed is None or key in claimed:
            return None
        # Ids are unique within a kind only, and a node may be called as this orchestrator is.
        lease = await self._registry.claim(key, f"{ORCHESTRATOR}:{self._orchestrator}")
        if lease is None:
            return None
        _LOG.info("scaling of the model is decided here", extra={"fields": {"model": model}})
        losing = tasks.create_task(self._give_up_when_lost(model, lease), name=f"scaler claim {model}")
        charge = self._charges[model] = _Charge(lease, Scale(rule, time.monotonic()), losing)
        return charge

    async def _give_up_when_lost(self, model: str, lease: Lease) -> None:
        """Another orchestrator decides, after an outage of the registry or a pause of this process."""
        await lease.wait_lost()
        _LOG.warning("another orchestrator decides on the replicas of model %s now", model)
        self._charges.pop(model, None)
        await released(lease)

    async def _give_up(self, model: str) -> None:
        charge = self._charges.pop(model)
        charge.losing.cancel()
        await released(charge.lease)

    async def _scale(self, spec: RevisionSpec, charge: _Charge) -> None:
        """Decides on one model, and writes what is new."""
        view, model, now_s = self._view, spec.model, time.monotonic()
        revision, current = view.desired.get(model, ("", 0))
        assert spec.scaling is not None
        if revision != spec.revision:
            return  # the lane of the serving revision is not open yet
        if charge.scale.rule != spec.scaling:
            charge.scale = Scale(spec.scaling, now_s)
        demand = demand_of(
            (load, now_s - heard_s)
            for id, (loads, heard_s) in view.loads.items()
            if id in view.orchestrators
            for load in loads
            if (load.model, load.revision) == (model, revision)
        )
        wanted = charge.scale.decide(demand, current, view.ready[model, revision], now_s)
        if wanted != current and await self._write(model, revision, current, wanted):
            view.desired[model] = (revision, wanted)
            _LOG.info("replicas", extra={"fields": {
                "model": model, "from": current, "to": wanted, "need": round(demand.need, 2), "idle_s": round(min(demand.idle_s, 1e6), 1),
            }})

    async def _write(self, model: str, revision: str, current: int, wanted: int) -> bool:
        """Changes the number in the document, and nothing else; False where the document is another meanwhile."""
        key = f"{DESIRED}{model}"
        is_mine = False

        def change(document: bytes | None) -> bytes | None:
            nonlocal is_mine
            wish = None if document is None else _read_wish(key, document)
            is_mine = wish is not None and _number(wish) == (revision, current)
            return json.dumps({**wish, "replicas": wanted}).encode() if wish is not None and is_mine else None

        await amend(self._registry, key, change)
        return is_mine

    async def _follow_loads(self) -> None:
        async for documents in self._registry.watch_documents(LOADS):
            view, now_s = self._view, time.monotonic()
            for key in view.documents.keys() - documents.keys():
                view.loads.pop(key.removeprefix(LOADS), None)
            for key, document in documents.items():
                if view.documents.get(key) == document:
                    continue
                try:
                    view.loads[key.removeprefix(LOADS)] = (decode_loads(document), now_s)
                except ValidationError as error:
                    _LOG.error("document %s holds no loads and is ignored: %s", key, error)
            view.documents = dict(documents)
            self._changed.set()

    async def _follow_orchestrators(self) -> None:
        async for registrations in self._registry.watch(ORCHESTRATOR):
            self._view.orchestrators = frozenset(registration.id for registration in registrations)
            self._changed.set()

    async def _follow_desired(self) -> None:
        async for documents in self._registry.watch_documents(DESIRED):
            desired: dict[str, tuple[str, int]] = {}
            for key, document in documents.items():
                wish = _read_wish(key, document)
                if wish is not None:
                    desired[wish["model"]] = _number(wish)
            self._view.desired = desired
            self._changed.set()

    async def _follow_groups(self) -> None:
        async for registrations in self._registry.watch(GROUP):
            self._view.ready = Counter(
                (registration.metadata.get("model", ""), registration.metadata.get("revision", "")) for registration in registrations
            )
            self._changed.set()

    async def _follow_claims(self) -> None:
        async for claims in self._registry.watch_claims(SCALER):
            self._view.claimed = frozenset(claims)
            self._changed.set()


def _read_wish(key: str, document: bytes) -> dict[str, Any] | None:
    """A document of desired state with all its fields; None, with a line in the log, where it is none."""
    try:
        wish: dict[str, Any] = json.loads(document)
        wish |= {"model": str(wish["model"]), "revision": str(wish["revision"]), "replicas": int(wish["replicas"])}
    except (ValueError, KeyError, TypeError) as error:
        _LOG.error("document %s is no desired state and is ignored: %s", key, error)
        return None
    return wish


def _number(wish: Mapping[str, Any]) -> tuple[str, int]:
    """Revision and number of replicas."""
    return wish["revision"], wish["replicas"]

"""Follows the registry, and knows at any moment which models there are."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from tensorway.errors import NotFound, Unavailable
from tensorway.registry.port import DESIRED, GROUP, NODE, NODES, REVISIONS, Registration, Registry
from tensorway.revisions import decode_revision
from tensorway_gateway.models import Desired, GroupReport, Model, Revision, build_models, published_revision

_LOG = logging.getLogger(__name__)

T = TypeVar("T")


class Catalog:
    """The models of the mesh. `on_change` is called in the loop after every change of them."""

    def __init__(self, registry: Registry, on_change: Callable[[], None]) -> None:
        self._registry = registry
        self._on_change = on_change
        self._models: Mapping[str, Model] = {}
        #: What has been read so far; None until the first look.
        self._desired: tuple[Desired, ...] | None = None
        self._published: dict[str, tuple[bytes, Revision | None]] | None = None
        self._groups: tuple[Registration, ...] = ()
        self._nodes: frozenset[str] = frozenset()
        self._reports: dict[str, tuple[GroupReport, ...]] = {}
        self._node_documents: Mapping[str, bytes] = {}

    @property
    def models(self) -> Mapping[str, Model]:
        """All models by name, in the order of their names."""
        return self._models

    @property
    def is_known(self) -> bool:
        """True once the registry has been read: before that no name can be called unknown."""
        return self._desired is not None and self._published is not None

    def node_documents(self) -> Mapping[str, bytes]:
        """What each live node says of itself and its groups, JSON by the node's id."""
        return {node: document for node, document in self._node_documents.items() if node in self._nodes}

    def find(self, name: str, sees: Callable[[str], bool] = lambda name: True) -> Model:
        """The model of that name. Raises NotFound that lists the names there are, as far as who asks `sees` them."""
        model = self._models.get(name)
        if model is None:
            raise self._unknown(name, sees)
        return model

    def version(self, name: str, revision: str) -> str:
        """The author's label of a revision; empty where it is not known (any more)."""
        model = self._models.get(name)
        found = () if model is None else (each.spec.version for each in model.revisions if each.spec.revision == revision)
        return next(iter(found), "")

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_desired(), name="desired state")
            tasks.create_task(self._follow_revisions(), name="revisions")
            tasks.create_task(self._follow_groups(), name="groups")
            tasks.create_task(self._follow_nodes(), name="nodes")
            tasks.create_task(self._follow_reports(), name="node documents")

    def _unknown(self, name: str, sees: Callable[[str], bool]) -> NotFound | Unavailable:
        if not self.is_known:
            return Unavailable("the gateway has not read the registry yet", retry_after_s=1.0)
        known = ", ".join(filter(sees, self._models)) or "none"
        if not name:
            return NotFound(f"no model is named; models known: {known}", field="model")
        return NotFound(f"model {name[:128]!r} is unknown here; models known: {known}", field="model")

    async def _follow_desired(self) -> None:
        async for documents in self._registry.watch_documents(DESIRED):
            found = (_read(key, document, _desired) for key, document in documents.items())
            self._desired = tuple(item for item in found if item is not None)
            self._rebuild()

    async def _follow_revisions(self) -> None:
        async for documents in self._registry.watch_documents(REVISIONS):
            before = self._published or {}
            after: dict[str, tuple[bytes, Revision | None]] = {}
            for key, document in documents.items():
                known = before.get(key)
                after[key] = known if known is not None and known[0] == document else (document, _read(key, document, _revision))
            self._published = after
            self._rebuild()

    async def _follow_groups(self) -> None:
        async for groups in self._registry.watch(GROUP):
            self._groups = groups
            self._rebuild()

    async def _follow_nodes(self) -> None:
        async for registrations in self._registry.watch(NODE):
            self._nodes = frozenset(registration.id for registration in registrations)
            self._rebuild()

    async def _follow_reports(self) -> None:
        async for documents in self._registry.watch_documents(NODES):
            self._node_documents = {key.removeprefix(NODES): document for key, document in documents.items()}
            self._reports = {key.removeprefix(NODES): _read(key, document, _reports) or () for key, document in documents.items()}
            self._rebuild()

    def _rebuild(self) -> None:
        if self._desired is None or self._published is None:
            return
        revisions = {
            (revision.spec.model, revision.spec.revision): revision for _, revision in self._published.values() if revision is not None
        }
        # A node that died leaves its document behind; only a live node's word counts.
        reports = [report for node, found in self._reports.items() if node in self._nodes for report in found]
        self._models = build_models(self._desired, revisions, self._groups, reports)
        self._on_change()


def _read(key: str, document: bytes, decode: Callable[[bytes], T]) -> T | None:
    """The decoded document; None, with a line in the log, where it is not what its key says."""
    try:
        return decode(document)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        _LOG.error("registry document %s cannot be read and is ignored: %s", key, error)
        return None


def _desired(document: bytes) -> Desired:
    found: dict[str, Any] = json.loads(document)
    return Desired(str(found["model"]), str(found["revision"]), int(found["replicas"]))


def _revision(document: bytes) -> Revision:
    return published_revision(decode_revision(document))


def _reports(document: bytes) -> tuple[GroupReport, ...]:
    found: dict[str, Any] = json.loads(document)
    return tuple(
        GroupReport(
            str(group["model"]), str(group["revision"]), str(group["state"]), str(group.get("reason", "")), str(group.get("detail", ""))
        )
        for group in found["groups"]
    )

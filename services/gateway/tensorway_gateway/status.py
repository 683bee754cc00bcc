"""The pages of a gateway's ops port: the status page, what it polls, and where Prometheus finds every member."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Final

from pydantic import ValidationError

from tensorway.errors import TensorwayError
from tensorway.loads import ModelLoad, decode_loads, load_key
from tensorway.registry.port import GATEWAY, NODE, ORCHESTRATOR, Registration, Registry
from tensorway.telemetry.ops import Page, PageSource
from tensorway.telemetry.ops_metrics import VERSION
from tensorway_gateway.admission import Admission
from tensorway_gateway.catalog import Catalog
from tensorway_gateway.statistics import Statistics
from tensorway_gateway.status_view import bucket_bounds_s, describe_errors, describe_groups, describe_members, describe_models
from tensorway_gateway.upstream import Upstream

_LOG = logging.getLogger(__name__)
_JSON: Final = "application/json"
#: However many look: the registry is asked so often at most, seconds.
_FRESH_S: Final = 1.0
#: And waited for so long, seconds; then the page shows what is known.
_REGISTRY_S: Final = 2.0
_KINDS: Final = (GATEWAY, ORCHESTRATOR, NODE)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the registry said."""

    members: tuple[Registration, ...] = ()
    loads: tuple[tuple[str, tuple[ModelLoad, ...]], ...] = ()
    #: Why this is old; empty where it is not.
    problem: str = ""


@dataclass(slots=True, eq=False)
class Status:
    """What this gateway knows of the mesh, as pages. Never holds inputs, answers or credentials."""

    id: str
    registry: Registry
    catalog: Catalog
    upstream: Upstream
    admission: Admission
    statistics: Statistics
    readiness: Callable[[], str | None]
    _began_s: float = field(default_factory=time.monotonic)
    _asked: _Asked = field(default_factory=_Asked)
    _asked_s: float = float("-inf")
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _page: Page = field(default_factory=lambda: status_page())

    def pages(self) -> dict[str, PageSource]:
        """By path: `/`, `/status.json` and `/targets`."""
        return {"/": self._html, "/status.json": self._json, "/targets": self._targets}

    async def _html(self) -> Page:
        return self._page

    async def _json(self) -> Page:
        asked = await self._ask()
        return Page(_JSON, json.dumps(self._document(asked), separators=(",", ":")).encode())

    async def _targets(self) -> Page:
        """Every ops port, as Prometheus' http_sd_configs wants it."""
        asked = await self._ask()
        targets = [
            {"targets": [ops], "labels": {"__meta_kind": member.kind, "__meta_member": member.id}}
            for member in asked.members if (ops := member.metadata.get("ops"))
        ]
        return Page(_JSON, json.dumps(targets).encode())

    def _document(self, asked: _Asked) -> dict[str, Any]:
        admission = self.admission
        return {
            "format": 1,
            "gateway": {
                "id": self.id, "version": VERSION, "python": platform.python_version(), "uptime_s": time.monotonic() - self._began_s,
                "unix_s": time.time(), "unready": self.readiness() or "",
            },
            "registry_problem": asked.problem,
            "in_flight": {"num_requests": admission.num_requests, "num_bytes": admission.num_bytes},
            "num_unknown": sum(self.statistics.unknown.values()),
            "bucket_bounds_s": bucket_bounds_s(),
            "members": describe_members(asked.members),
            "orchestrators": [
                {"id": one.id.partition("@")[0], "is_connected": one.can_take, "num_sent": one.num_sent, "num_in_flight": one.num_in_flight}
                for one in self.upstream.orchestrators()
            ],
            "models": describe_models(self.catalog.models.values(), self.statistics, asked.loads),
            "groups": describe_groups(self.catalog.node_documents(), self.statistics.groups),
            "errors": describe_errors(self.statistics.errors.newest_first()),
        }

    async def _ask(self) -> _Asked:
        """What the registry says, or said last: a registry that is away takes nothing from the page but its freshness."""
        async with self._asking:
            if time.monotonic() - self._asked_s < _FRESH_S:
                return self._asked
            try:
                async with asyncio.timeout(_REGISTRY_S):
                    members = [found for kind in _KINDS for found in await self.registry.registrations(kind)]
                    loads = [(one.id, await self._said(one.id)) for one in members if one.kind == ORCHESTRATOR]
                self._asked = _Asked(tuple(members), tuple(loads))
            except (TimeoutError, TensorwayError) as error:
                why = str(error) or f"it has not answered within {_REGISTRY_S:.0f} s"
                self._asked = _Asked(self._asked.members, self._asked.loads, f"the registry cannot be read: {why}")
            self._asked_s = time.monotonic()
            return self._asked

    async def _said(self, orchestrator: str) -> tuple[ModelLoad, ...]:
        document = await self.registry.read(load_key(orchestrator))
        try:
            return () if document is None else decode_loads(document)
        except ValidationError as error:
            _LOG.error("the document of orchestrator %s holds no loads and is ignored: %s", orchestrator, error)
            return ()


def status_page() -> Page:
    """The page, whole: style and script stand in it, and nothing else may run or be fetched but `/status.json`."""
    folder = resources.files("tensorway_gateway") / "page"
    html, style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js"))
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    whole = html.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    return Page("text/html", whole.encode(), {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})


def _digest(text: str) -> str:
    """A source expression of Content Security Policy Level 3."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

"""The status page without a mesh: its policy, its document's parts, a registry that is away, and a mesh of hundreds of groups."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from tensorway.errors import InvalidRequest, Unavailable
from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import GATEWAY, NODE, Registration, Registry
from tensorway.telemetry.ops import OpsServer, Page
from tensorway_gateway.admission import Admission, Limits
from tensorway_gateway.catalog import Catalog
from tensorway_gateway.recent_errors import RecentErrors
from tensorway_gateway.statistics import BUCKETS_S, Statistics
from tensorway_gateway.status import Status, status_page
from tensorway_gateway.status_view import describe_groups
from tensorway_gateway.upstream import Upstream
from tests.browser import NO_BROWSER, find_chromium, open_tab

pytestmark = pytest.mark.asyncio

NUM_GROUPS = 400


async def test_nothing_but_the_pages_own_script_and_style_may_run() -> None:
    page = status_page()
    text, policy = page.body.decode(), page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert " style=" not in text
    assert "innerHTML" not in text


async def test_the_last_errors_are_kept_and_nothing_else() -> None:
    errors = RecentErrors(num_kept=3)
    for number in range(5):
        errors.add("m", f"r-{number}", InvalidRequest("x" * 1000, field="inputs"))
    kept = errors.newest_first()
    assert [error.request_id for error in kept] == ["r-4", "r-3", "r-2"]
    assert all(len(error.sentence) <= 300 and error.code == "INVALID_ARGUMENT" for error in kept)


async def test_answers_are_counted_for_a_bounded_number_of_groups() -> None:
    statistics = Statistics()
    for number in range(10_000):
        statistics.answered_by(f"m.{number}@n#1")
    assert len(statistics.groups) <= 4096
    assert statistics.groups["m.9999@n#1"] == 1


async def test_a_document_that_cannot_be_read_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    good = {"groups": [{
        "id": "m.0@a", "model": "m", "revision": "r", "state": "ready", "epoch": 2, "detail": "", "reason": "",
        "ranks": [{"rank": 0, "node": "a", "pid": 7, "device": "cpu", "state": "ready", "memory_bytes": 5}],
    }]}
    found = describe_groups({"a": json.dumps(good).encode(), "b": b"{"}, Counter({"m.0@a#2": 9, "m.0@a#1": 100}))
    (group,) = found
    assert (group["node"], group["num_answers"]) == ("a", 9)
    assert group["ranks"] == [{"rank": 0, "node": "a", "device": "cpu", "state": "ready", "detail": None}]
    assert "node b" in caplog.text


class _Away:
    """A registry that is there once, and then not."""

    def __init__(self, registry: DirectoryRegistry) -> None:
        self._registry = registry
        self.is_away = False

    async def registrations(self, kind: str) -> tuple[Registration, ...]:
        if self.is_away:
            raise Unavailable("Consul does not answer", field="registry")
        return await self._registry.registrations(kind)

    async def read(self, key: str) -> bytes | None:
        return await self._registry.read(key)


async def test_a_registry_that_is_away_takes_nothing_but_freshness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with DirectoryRegistry(tmp_path) as directory:
        registry = _Away(directory)
        await directory.register(Registration(GATEWAY, "g", "h:1", {"ops": "h:2"}))
        await directory.register(Registration(NODE, "n", "h:3", {}))
        port = cast("Registry", registry)
        catalog, upstream = Catalog(port, lambda: None), Upstream(port, 1 << 20, 1.0, lambda: None)
        status = Status("g", port, catalog, upstream, Admission(Limits(1, 1, 1.0)), Statistics(), lambda: "no orchestrator")
        pages = status.pages()
        before = json.loads((await pages["/status.json"]()).body)
        assert before["gateway"]["unready"] == "no orchestrator"
        assert json.loads((await pages["/targets"]()).body) == [
            {"targets": ["h:2"], "labels": {"__meta_kind": "gateway", "__meta_member": "g"}},
        ]
        registry.is_away = True
        now_s = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now_s + 10.0)
        after = json.loads((await pages["/status.json"]()).body)
        assert after["members"] == before["members"]
        assert after["registry_problem"] == "the registry cannot be read: Consul does not answer"


def large_mesh(unix_s: float, uptime_s: float) -> dict[str, Any]:
    """A document of hundreds of groups of all states."""
    states = ("ready", "ready", "ready", "ready", "ready", "ready", "warming", "backing_off")
    groups = [
        {
            "id": f"model-{number % 12}.{number}@node-{number % 24}", "model": f"model-{number % 12}", "revision": "r" * 64,
            "node": f"node-{number % 24}", "state": states[number % 8], "epoch": 1, "detail": "", "reason": "",
            "num_answers": int(uptime_s * (number % 9)),
            "ranks": [
                {"rank": rank, "node": f"node-{number % 24}", "device": f"cuda:{rank}", "state": states[number % 8], "detail": ""}
                for rank in range(1 + number % 4)
            ],
        }
        for number in range(NUM_GROUPS)
    ]
    members = [
        {"kind": kind, "id": f"{kind}-{number}", "endpoint": "127.0.0.1:8001", "ops": "", "zone": "", "pid": "1"}
        for kind, count in (("gateway", 4), ("orchestrator", 6), ("node", 24)) for number in range(count)
    ]
    buckets = [int(uptime_s * 10)] * 8 + [0] * (len(BUCKETS_S) - 7)
    models = [
        {
            "name": f"model-{number}", "revision": "r" * 64, "version": "1", "engine": "python", "generates": number % 3 == 0,
            "state": "READY", "reason": "", "num_wanted": 34, "num_ready": 30, "requests": {"OK": int(uptime_s * 80)},
            "duration_buckets": buckets, "first_delta_buckets": buckets, "num_messages": 0, "arrival_rows_per_s": 1.0, "queue_s": 0.0,
            "utilisation": 0.5,
            "waiting_rows": 3, "num_open": 5, "orchestrators": {f"orchestrator-{number % 6}": 10.0},
        }
        for number in range(12)
    ]
    return {
        "format": 1, "registry_problem": "", "in_flight": {"num_requests": 60, "num_bytes": 1 << 20}, "num_unknown": 0,
        "gateway": {"id": "gateway-0", "version": "0.1.0", "python": "3.11", "uptime_s": uptime_s, "unix_s": unix_s, "unready": ""},
        "bucket_bounds_s": BUCKETS_S, "members": members, "models": models, "groups": groups, "errors": [],
        "orchestrators": [
            {"id": f"orchestrator-{number}", "is_connected": number != 5, "num_sent": int(uptime_s * 100), "num_in_flight": 1}
            for number in range(6)
        ],
    }


@pytest.mark.skipif(find_chromium() is None, reason=NO_BROWSER)
async def test_a_large_mesh_fits_the_page(tmp_path: Path) -> None:
    began_s = time.monotonic()

    async def document() -> Page:
        return Page("application/json", json.dumps(large_mesh(time.time(), 1000.0 + time.monotonic() - began_s)).encode())

    async def page() -> Page:
        return status_page()

    server = OpsServer("127.0.0.1:0", lambda: None, CollectorRegistry(), pages={"/": page, "/status.json": document})
    await server.start()
    try:
        async with aiohttp.ClientSession() as session, session.get(f"http://{server.endpoint}/") as answer:
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        async with open_tab(tmp_path, f"http://{server.endpoint}/") as tab:
            await tab.until("document.body && Number(document.body.dataset.looks) >= 2")
            assert await tab.evaluate("document.querySelectorAll('#map [data-group]').length") == NUM_GROUPS
            assert await tab.evaluate("document.querySelectorAll('#map .rank.failed').length") > 0
            assert await tab.evaluate("document.querySelectorAll('#map .line.broken').length") == 1
            assert await tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            # Every group lies inside of its node, and the whole map inside of the picture.
            assert await tab.evaluate("""(() => {
                const map = document.getElementById("map").getBoundingClientRect();
                return [...document.querySelectorAll("#map rect")].every((rect) => {
                    const box = rect.getBoundingClientRect();
                    return box.left >= map.left - 1 && box.right <= map.right + 1 && box.bottom <= map.bottom + 1;
                });
            })()""")
            assert tab.complaints == []
            await tab.screenshot(tmp_path / "large.png")
    finally:
        await server.stop()

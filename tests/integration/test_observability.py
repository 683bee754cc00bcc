"""What operators look at, on one real mesh under a little load: every rule and dashboard in a real Prometheus, `tensorway top`, and the
status page in a real browser."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import sysconfig
import termios
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import yaml

from tensorway import AsyncClient
from tensorway.errors import TensorwayError
from tensorway.registry.port import GATEWAY, NODE, ORCHESTRATOR
from tests.browser import NO_BROWSER, find_chromium, open_tab
from tests.deploy.prometheus import SCRAPE_EVERY_S, running_prometheus
from tests.integration.conftest import ROOT, Mesh, running_mesh
from tests.integration.generate_world import small
from tests.integration.hurt_groups import real

pytestmark = [pytest.mark.models, pytest.mark.asyncio(loop_scope="module")]

TENSORWAY = Path(sysconfig.get_path("scripts")) / "tensorway"
PROMETHEUS = ROOT / "deploy" / "prometheus"
#: Expressions that a healthy mesh on a CPU without limits, certificates and traces has nothing to say to: what they are about.
MAY_BE_EMPTY = (
    "tensorway_orchestrator_ejections_total", "rank:tensorway_rank_memory:ratio", "tensorway_rank_memory_limit_bytes",
)


@dataclass
class World:
    """A mesh under load."""

    mesh: Mesh
    ops: str
    folder: Path


async def keep_asking(endpoint: str, talker: str) -> None:
    """A little of everything, wrong requests too."""
    async with AsyncClient(endpoint) as client:
        while True:
            await client.infer("identity", {"input": np.ones((2, 4), np.float32)})
            async for _ in client.generate(talker, [1, 2, 3, 4], max_tokens=4):
                pass
            try:
                await client.infer("identity", {"<b>wrong</b>": np.ones((1, 4), np.float32)}, request_id="wrong-one")
            except TensorwayError:
                await asyncio.sleep(0.05)


@asynccontextmanager
async def load(mesh: Mesh, talker: str) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(keep_asking(mesh.endpoint, talker))
        yield
        asking.cancel()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("seen")
    models = folder / "models"
    models.mkdir()
    talker = small(models, "talker", pipeline=2, num_layers=2)
    async with running_mesh(folder, real(models, "identity", "identity"), talker, models_dir=models) as mesh:
        (gateway,) = await mesh.members(GATEWAY)
        async with load(mesh, talker):
            yield World(mesh, gateway.metadata["ops"], folder)


def dashboard_expressions() -> set[str]:
    found = set()
    for path in (ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                found.add(re.sub(r"\$(model|instance)", ".+", target["expr"].replace("$__rate_interval", "1m")))
    return found


async def test_every_expression_finds_something_in_a_real_prometheus(world: World) -> None:
    document = yaml.safe_load((PROMETHEUS / "prometheus-http.yml").read_text())
    document["global"] = dict.fromkeys(("scrape_interval", "evaluation_interval"), f"{SCRAPE_EVERY_S * 1e3:.0f}ms")
    document["rule_files"] = [str(PROMETHEUS / "rules" / "*.yml")]
    (job,) = document["scrape_configs"]
    job["http_sd_configs"][0] |= {"url": f"http://{world.ops}/targets", "refresh_interval": "1s"}
    config = world.folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(document))
    async with running_prometheus(world.folder, config) as prometheus:
        # Rates need two scrapes, rules those rates, and a model its first request.
        for name in (
            "model:tensorway_orchestrator_tokens:rate1m > 0", "model:tensorway_gateway_slow:ratio_rate5m >= 0",
            "model:tensorway_orchestrator_inter_token_seconds:p99_5m > 0",
        ):
            await prometheus.wait(name)
        targets = await prometheus.targets()
        assert {target["labels"]["job"] for target in targets} == {"tensorway-gateway", "tensorway-orchestrator", "tensorway-node"}
        assert all(target["health"] == "up" for target in targets), targets
        rules = await prometheus.rules()
        assert {rule["health"] for rule in rules} == {"ok"}, [rule for rule in rules if rule["health"] != "ok"]
        for expression in sorted(dashboard_expressions() | {rule["name"] for rule in rules if rule["type"] == "recording"}):
            if any(word in expression for word in MAY_BE_EMPTY):
                await prometheus.query(expression)
            else:
                # Groups of rules are evaluated at instants of their own: the last may be a moment behind.
                await prometheus.wait(expression)
        # What the alerts look at is there: an alert on a metric that nobody exports never fires.
        exported = {row["metric"]["__name__"] for row in await prometheus.query('count by (__name__) ({__name__=~"tensorway_.+"})')}
        # Recorded ones, which have colons, were looked at before.
        queries = " ".join(re.sub(r"[a-z_]+:tensorway_[a-z_0-9:]+", "", rule["query"]) for rule in rules)
        named = set(re.findall(r"tensorway_[a-z_]+", queries))
        absent = {"tensorway_rank_memory_limit_bytes", "tensorway_tls_certificate_expiry_timestamp_seconds", "tensorway_trace_spans_total"}
        assert named - exported - absent == set()
        firing = await prometheus.query('ALERTS{alertstate="firing"}')
        assert [alert["metric"]["alertname"] for alert in firing] == []


async def test_every_service_tells_who_it_is_and_what_its_links_carry(world: World) -> None:
    def read(ops: str) -> str:
        with urllib.request.urlopen(f"http://{ops}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    for kind in (GATEWAY, ORCHESTRATOR, NODE):
        (member,) = await world.mesh.members(kind)
        text = await asyncio.to_thread(read, member.metadata["ops"])
        assert re.search(rf'tensorway_build_info{{python=".+",service="{kind}",version=".+"}} 1\.0', text)
        assert "\ntensorway_ready 1.0" in text
        assert "\ntensorway_registry_reachable 1.0" in text
        carried = {word: float(number) for word, number in re.findall(r'tensorway_link_frames_total{direction="(\w+)"} (\S+)', text)}
        assert all(number > 0 for number in carried.values()) or kind == NODE
        # Bounded: no label holds what a caller chooses.
        assert "wrong" not in text


async def run_top(world: World, *arguments: str, **environment: str) -> str:
    process = await asyncio.create_subprocess_exec(
        TENSORWAY, "top", "--endpoint", world.mesh.endpoint, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **environment},
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_top_tells_one_frame_as_json(world: World) -> None:
    frame = json.loads(await run_top(world, "--json", "--every", "0.4"))
    assert [(row["kind"], row["is_ready"]) for row in frame["members"]] == [(GATEWAY, True), (ORCHESTRATOR, True), (NODE, True)]
    models = {row["name"]: row for row in frame["models"]}
    assert set(models) == {"identity", "talker"}
    assert all(row["requests_per_s"] > 0 and row["num_ready"] == row["num_wanted"] == 1 for row in models.values())
    assert models["identity"]["failures_per_s"] > 0
    assert models["talker"]["tokens_per_s"] > models["talker"]["requests_per_s"]
    assert models["identity"]["p50_s"] <= models["identity"]["p99_s"]
    assert models["identity"]["batch_rows"] == 2
    groups = {row["model"]: row for row in frame["groups"]}
    assert [rank["rank"] for rank in groups["talker"]["ranks"]] == [0, 1]
    assert all(rank["is_ready"] and rank["memory_bytes"] > 10**7 for row in frame["groups"] for rank in row["ranks"])
    assert frame["errors"][0] | {"unix_s": 0, "sentence": ""} == {
        "unix_s": 0, "model": "identity", "code": "INVALID_ARGUMENT", "sentence": "", "request_id": "wrong-one",
    }
    assert frame["unreached"] == []


async def test_top_fits_a_narrow_terminal(world: World) -> None:
    shown = await run_top(world, "--once", "--every", "0.4", COLUMNS="80")
    assert max(map(len, shown.splitlines())) <= 80
    for word in ("gateway-1", "orchestrator-1", "node-1", "identity", "talker", "■■", "INVALID_ARGUMENT", "1/1", "req/s"):
        assert word in shown, shown


async def leave_top(world: World, is_by_key: bool) -> bytes:
    """Runs it on a terminal until it has drawn three frames, and ends it with q or with Ctrl-C; what the terminal saw."""
    own, its = pty.openpty()
    before = termios.tcgetattr(its)
    process = await asyncio.create_subprocess_exec(
        TENSORWAY, "top", "--endpoint", world.mesh.endpoint, "--every", "0.3", stdin=its, stdout=its, stderr=its,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
    )
    seen, has_frames, loop = bytearray(), asyncio.Event(), asyncio.get_running_loop()

    def read() -> None:
        seen.extend(os.read(own, 65536))
        if seen.count(b"tensorway top") >= 3:
            has_frames.set()

    loop.add_reader(own, read)
    try:
        async with asyncio.timeout(60):
            await has_frames.wait()
            if is_by_key:
                os.write(own, b"sq")
            else:
                process.send_signal(signal.SIGINT)
            assert await process.wait() == 0, seen.decode()
        assert termios.tcgetattr(its) == before
    finally:
        loop.remove_reader(own)
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.set_blocking(own, False)
        with contextlib.suppress(BlockingIOError):
            seen.extend(os.read(own, 65536))
        os.close(its)
        os.close(own)
    return bytes(seen)


async def test_top_goes_on_until_it_is_left_and_leaves_the_terminal_as_it_was(world: World) -> None:
    for seen in await asyncio.gather(leave_top(world, is_by_key=True), leave_top(world, is_by_key=False)):
        # It drew on the alternate screen, once, and left it.
        assert seen.count(b"\x1b[?1049h") == 1
        assert b"\x1b[?1049l" in seen
        assert b"Traceback" not in seen


async def fetch_status(world: World) -> dict[str, Any]:
    def read() -> dict[str, Any]:
        with urllib.request.urlopen(f"http://{world.ops}/status.json", timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    return await asyncio.to_thread(read)


async def test_the_status_document_tells_the_mesh(world: World) -> None:
    status = await fetch_status(world)
    assert status["format"] == 1
    assert {(one["kind"], one["id"]) for one in status["members"]} == {
        (GATEWAY, "gateway-1"), (ORCHESTRATOR, "orchestrator-1"), (NODE, "node-1"),
    }
    assert {group["model"]: len(group["ranks"]) for group in status["groups"]} == {"identity": 1, "talker": 2}
    (identity,) = [model for model in status["models"] if model["name"] == "identity"]
    assert sum(identity["duration_buckets"]) == sum(identity["requests"].values()) > 0
    assert len(identity["duration_buckets"]) == len(status["bucket_bounds_s"]) + 1
    (answering,) = [group["num_answers"] for group in status["groups"] if group["model"] == "identity"]
    assert 0 < answering <= identity["requests"]["OK"]
    assert len(status["errors"]) <= 50


@pytest.mark.skipif(find_chromium() is None, reason=NO_BROWSER)
async def test_the_status_page_shows_it_in_a_browser(world: World, tmp_path: Path) -> None:
    async with open_tab(tmp_path, f"http://{world.ops}/") as tab:
        await tab.until("document.body && Number(document.body.dataset.looks) >= 3")
        rows = await tab.evaluate("[...document.querySelectorAll('#models tbody tr')].map(row => row.innerText)")
        assert [row.split("\n")[0].strip() for row in rows] == ["identity", "talker"]
        assert all("1 of 1" in row and re.search(r"[\d.]+ /s", row) for row in rows)
        assert await tab.evaluate("document.getElementById('state').innerText") == "ready"
        assert await tab.evaluate("document.querySelectorAll('#map .rank.ready').length") == 3
        assert await tab.evaluate("document.querySelectorAll('#map .line.used').length") == 3
        assert await tab.evaluate("[...document.querySelectorAll('.spark path.low')].every(path => path.getTotalLength() > 0)")
        # What a caller has sent is text here, and the request can be found in the logs.
        error = await tab.evaluate("document.querySelector('#errors tbody tr').innerText")
        assert "INVALID_ARGUMENT" in error
        assert "<b>wrong</b>" in error
        assert "wrong-one" in error
        assert await tab.evaluate("document.querySelectorAll('#errors b').length") == 0
        for scheme, is_dark in (("dark", True), ("light", False)):
            await tab.prefer(scheme)
            ground = await tab.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (int(ground.strip("rgb()").split(",")[0]) < 128) is is_dark
        # Nothing was refused by the page's own policy, and nothing came from elsewhere.
        assert tab.complaints == []
        assert {url for url in tab.fetched if not url.startswith("data:")} == {f"http://{world.ops}/", f"http://{world.ops}/status.json"}
        await tab.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000

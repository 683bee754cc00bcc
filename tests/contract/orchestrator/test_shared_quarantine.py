"""A quarantine that several orchestrators share, over real links and real registries: a directory, and Consul."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from tensorway.errors import ModelFailed, Unavailable
from tensorway.registry import open_registry
from tensorway.registry.port import Registry
from tensorway.v1 import link_pb2
from tensorway_orchestrator import wire
from tensorway_orchestrator.quarantine import KEPT_S, Content, Quarantines
from tensorway_orchestrator.quarantine_view import QUARANTINE, Note, encode_note, quarantine_key
from tensorway_orchestrator.shared_quarantine import SharedQuarantine
from tests.consul.agent import dev_agent
from tests.contract.orchestrator.conftest import ECHO, Batch, Bench, Leader, orchestrator_bench

POISON = b"poison".ljust(8)


@asynccontextmanager
async def sharing(name: str, registry: Registry, quarantines: Quarantines | None = None) -> AsyncIterator[Quarantines]:
    """An orchestrator's part in it."""
    quarantines = Quarantines() if quarantines is None else quarantines
    shared = SharedQuarantine(name, registry, quarantines)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(shared.run())
        try:
            yield quarantines
        finally:
            running.cancel()


@asynccontextmanager
async def benches(tmp_path: Path, *names: str) -> AsyncIterator[list[Bench]]:
    """Orchestrators of one mesh that share what they find."""
    async with AsyncExitStack() as stack:
        made = []
        for name in names:
            bench = await stack.enter_async_context(orchestrator_bench(tmp_path, group_wait_s=0.5))
            await stack.enter_async_context(sharing(name, bench.registry, bench.dispatcher.quarantines))
            made.append(bench)
        yield made


async def until(is_so: Callable[[], object]) -> None:
    """Waits for what a watch brings."""
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.005)


async def shown(registry: Registry, is_so: Callable[[set[str]], bool]) -> None:
    """Returns once the keys of the documents are so."""
    async with asyncio.timeout(20):
        async for documents in registry.watch_documents(QUARANTINE):
            if is_so(set(documents)):
                return


def refused_by(bench: Bench) -> bool:
    return bool(bench.dispatcher.quarantines.of(ECHO.model, ECHO.revision))


def fingerprint(content: bytes) -> str:
    """Of what `Bench.infer` sends."""
    head = link_pb2.RequestHead(request_id="any", model=ECHO.model, rows=1)
    head.inputs.add(name="input", dtype=2, shape=[1, len(content)], num_bytes=len(content))
    return wire.fingerprint(head.SerializeToString(), (content,))


def note(orchestrator: str, in_s: float = KEPT_S) -> bytes:
    return encode_note(Note(time.time() + in_s, orchestrator))


async def test_what_killed_two_groups_through_one_kills_no_third_through_another(tmp_path: Path) -> None:
    async with benches(tmp_path, "one", "two") as (one, two):
        stopping: list[asyncio.Task[None]] = []
        dead: list[str] = []

        async def stop(leader: Leader) -> None:
            await asyncio.sleep(0.3)  # the groups are of one node: deaths that are closer are not the request's
            await leader.server.stop(0.0)

        def mortal(name: str) -> Callable[[Batch], None]:
            def take(batch: Batch) -> None:
                if name not in dead and POISON in b"".join(map(bytes, batch.exchange.payload)):
                    dead.append(name)
                    stopping.append(tasks.create_task(stop(leaders[name])))
                else:
                    batch.echo()

            return take

        async with asyncio.TaskGroup() as tasks:
            leaders = {name: await one.add_leader(name, on_batch=mortal(name)) for name in ("a", "b", "c")}
            assert await two.infer("before", b"wholesome") == b"wholesome"
            with pytest.raises(ModelFailed, match="died with this request"):
                await one.infer("first", POISON, timeout_s=20)
            await until(lambda: refused_by(two))
            num_batches = sum(len(leader.batches) for leader in leaders.values())
            for bench in (two, one):
                with pytest.raises(ModelFailed, match="in quarantine"):
                    await bench.infer("again", POISON)
            assert (len(dead), sum(len(leader.batches) for leader in leaders.values())) == (2, num_batches)
            assert await two.infer("other", b"wholesome") == b"wholesome"
        assert (one.count("quarantined"), two.count("quarantined")) == (1, 0), "each counts its own finds"
        # One that starts later knows, too.
        async with benches(tmp_path, "three") as (three,):
            await until(lambda: refused_by(three))
            with pytest.raises(ModelFailed, match="in quarantine"):
                await three.infer("again", POISON)
        assert len(dead) == 2


async def test_a_request_that_killed_one_group_is_not_sent_again_once_its_content_is_known(tmp_path: Path) -> None:
    async with benches(tmp_path, "one") as (bench,):
        leaders = [await bench.add_leader(name, on_batch=lambda _: None) for name in ("a", "b")]
        call = asyncio.ensure_future(bench.infer("poison", POISON, timeout_s=20))
        await until(lambda: any(leader.batches for leader in leaders))
        content = Content(ECHO.model, ECHO.revision, fingerprint(POISON))
        await bench.registry.write(quarantine_key(content), note("another"))
        await until(lambda: refused_by(bench))
        (guilty,) = (leader for leader in leaders if leader.batches)
        await guilty.server.stop(0.0)
        with pytest.raises(ModelFailed, match="in quarantine"):
            await call
        assert sum(len(leader.batches) for leader in leaders) == 1
        assert bench.count("quarantined") == 0


async def test_an_outage_delays_the_news_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, aside = tmp_path / "registry", tmp_path / "aside"
    async with benches(tmp_path, "one", "two") as (one, two):
        await one.add_leader("a")
        assert await two.infer("before") == b"abc"
        root.rename(aside)
        root.write_text("")
        with pytest.raises(Unavailable):
            await one.registry.write("probe", b"")
        one.dispatcher.quarantines.of(ECHO.model, ECHO.revision).add(fingerprint(POISON), ("a", "b"), time.monotonic())
        with pytest.raises(ModelFailed, match="in quarantine"):
            await one.infer("again", POISON)
        assert await one.infer("other", b"wholesome") == b"wholesome"
        await until(lambda: "sharing the quarantine waits for the registry" in caplog.text)
        root.unlink()
        aside.rename(root)
        await until(lambda: refused_by(two))
        with pytest.raises(ModelFailed, match="in quarantine"):
            await two.infer("again", POISON)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def consul_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    async with dev_agent(tmp_path_factory.mktemp("consul")) as agent:
        yield agent.registry_url("quarantine", check="ttl")


@pytest.fixture(params=["directory", "consul"])
async def registries(request: pytest.FixtureRequest, tmp_path: Path, consul_url: str) -> AsyncIterator[tuple[Registry, Registry]]:
    """Two registry objects, as two processes have them, on the same registry."""
    url = consul_url if request.param == "consul" else f"directory:{tmp_path}/registry"
    one, two = open_registry(url), open_registry(url)
    try:
        yield one, two
    finally:
        await one.close()
        await two.close()


async def test_who_deletes_a_document_lifts_it_everywhere(registries: tuple[Registry, Registry]) -> None:
    contents = [Content("lifted", ECHO.revision, f"f{number}") for number in range(3)]
    async with sharing("one", registries[0]) as one, sharing("two", registries[1]) as two:
        quarantines = [each.of("lifted", ECHO.revision) for each in (one, two)]
        for content, quarantine in zip(contents, (*quarantines, quarantines[0]), strict=True):
            quarantine.add(content.fingerprint, ("a", "b"), time.monotonic())
        await until(lambda: all(each.holds(content.fingerprint, time.monotonic()) for each in quarantines for content in contents))
        await shown(registries[0], lambda keys: keys >= set(map(quarantine_key, contents)))
        await registries[1].delete(quarantine_key(contents[0]))
        await until(lambda: not any(each.holds("f0", time.monotonic()) for each in quarantines))
        assert all(each.holds("f1", time.monotonic()) and each.holds("f2", time.monotonic()) for each in quarantines)


async def test_what_is_over_is_deleted_by_its_finder_and_broken_documents_are_passed_over(registries: tuple[Registry, Registry]) -> None:
    """A restart under the same name: what is over is cleared away, what is not is refused."""
    keys = {name: quarantine_key(Content("over", ECHO.revision, name)) for name in ("own", "others", "live")}
    await registries[0].write(keys["own"], note("one", -5.0))
    await registries[0].write(keys["others"], note("gone", -5.0))
    await registries[0].write(keys["live"], note("one", 60.0))
    await registries[0].write(f"{QUARANTINE}broken", b"[]")
    async with sharing("one", registries[1]) as one:
        quarantine = one.of("over", ECHO.revision)
        await until(lambda: quarantine)
        await shown(registries[0], lambda found: keys["own"] not in found)
        now_s = time.monotonic()
        assert [quarantine.holds(name, now_s) for name in keys] == [False, False, True]
    found = {name for name, key in keys.items() if await registries[0].read(key) is not None}
    assert found == {"others", "live"}
    assert await registries[0].read(f"{QUARANTINE}broken") == b"[]"

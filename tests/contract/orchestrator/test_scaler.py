"""The load board and the scaler on a real registry: who decides, who counts, and what an outage does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tensorway.errors import Unavailable
from tensorway.loads import LOADS, ModelLoad, decode_loads, encode_loads, load_key
from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import DESIRED, GROUP, ORCHESTRATOR, Registration
from tensorway.resilience import Scaling
from tensorway_orchestrator.load_board import LoadBoard
from tensorway_orchestrator.scaler import Scaler
from tests.contract.orchestrator.conftest import ECHO, orchestrator_bench

SPEC = replace(ECHO, scaling=Scaling(0, 4, 0.7, 0.5))
KEY = f"{DESIRED}{SPEC.model}"


def load(need: float = 0.0, *, num_open: int = 0, idle_s: float = 1000.0) -> ModelLoad:
    return ModelLoad(SPEC.model, SPEC.revision, 1.0, 1.0, 0.0, 0.0, 1, 1.0, 0, num_open, need, idle_s, False)


async def tell(registry: DirectoryRegistry, orchestrator: str, said: ModelLoad) -> None:
    await registry.write(load_key(orchestrator), encode_loads((said,)))


async def want(registry: DirectoryRegistry, replicas: int, revision: str = SPEC.revision, **more: object) -> None:
    await registry.write(KEY, json.dumps({"model": SPEC.model, "revision": revision, "replicas": replicas, **more}).encode())


async def wanted(registry: DirectoryRegistry, replicas: int) -> dict[str, object]:
    """The document, once it says so many replicas."""
    async with asyncio.timeout(15):
        async for documents in registry.watch_documents(DESIRED):
            wish: dict[str, object] = json.loads(documents[KEY])
            if wish["replicas"] == replicas:
                return wish
    raise AssertionError("a watch never ends")


async def holder(registry: DirectoryRegistry, accept: Callable[[str], bool]) -> str:
    async with asyncio.timeout(15):
        async for claims in registry.watch_claims("scaler/"):
            if accept(found := claims.get(f"scaler/{SPEC.model}", "")):
                return found
    raise AssertionError("a watch never ends")


@asynccontextmanager
async def scaler(path: Path, name: str) -> AsyncIterator[DirectoryRegistry]:
    """A registered orchestrator that scales."""
    async with DirectoryRegistry(path) as registry, asyncio.TaskGroup() as tasks:
        await registry.register(Registration(ORCHESTRATOR, name, "127.0.0.1:1"))
        running = tasks.create_task(Scaler(name, registry, lambda: {SPEC.model: SPEC}).run())
        try:
            yield registry
        finally:
            running.cancel()


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[DirectoryRegistry]:
    async with DirectoryRegistry(tmp_path / "registry") as made:
        yield made


async def test_the_needs_of_live_orchestrators_add_up(tmp_path: Path, registry: DirectoryRegistry) -> None:
    """One that is dead, or speaks of another revision, does not count; whatever else the document says stays."""
    await want(registry, 1, note="kept")
    await registry.register(Registration(GROUP, "g", "127.0.0.1:1", {"model": SPEC.model, "revision": SPEC.revision}))
    await tell(registry, "dead", load(4.0))
    async with scaler(tmp_path / "registry", "one") as own:
        await own.register(Registration(ORCHESTRATOR, "two", "127.0.0.1:1"))
        await tell(registry, "one", load(1.0, num_open=1))
        await tell(registry, "two", load(1.1, num_open=1))
        assert (await wanted(registry, 2))["note"] == "kept"
        await tell(registry, "two", load(1.9, num_open=1))
        assert (await wanted(registry, 3))["revision"] == SPEC.revision


async def test_a_request_wakes_a_model_and_silence_ends_it(tmp_path: Path, registry: DirectoryRegistry) -> None:
    await want(registry, 0)
    async with scaler(tmp_path / "registry", "one"):
        await tell(registry, "one", load(num_open=1))
        await wanted(registry, 1)
        lease = await registry.register(Registration(GROUP, "g", "127.0.0.1:1", {"model": SPEC.model, "revision": SPEC.revision}))
        await tell(registry, "one", load(idle_s=1000.0))
        await wanted(registry, 0)
        await lease.release()


async def test_one_decides_and_another_follows_it(tmp_path: Path, registry: DirectoryRegistry) -> None:
    await want(registry, 0)
    async with AsyncExitStack() as second:
        async with scaler(tmp_path / "registry", "one"):
            assert await holder(registry, bool) == "orchestrator:one"
            await second.enter_async_context(scaler(tmp_path / "registry", "two"))
        assert await holder(registry, lambda found: found not in ("", "orchestrator:one")) == "orchestrator:two"
        await tell(registry, "two", load(num_open=1))
        await wanted(registry, 1)


async def test_broken_documents_are_passed_over(tmp_path: Path, registry: DirectoryRegistry) -> None:
    await want(registry, 0)
    await registry.write(f"{DESIRED}broken", b"[]")
    async with scaler(tmp_path / "registry", "one") as own:
        await own.register(Registration(ORCHESTRATOR, "two", "127.0.0.1:1"))
        await registry.write(load_key("two"), b"{not json")
        await tell(registry, "one", load(num_open=1))
        await wanted(registry, 1)


async def test_what_could_not_be_told_is_told_when_the_registry_is_back(tmp_path: Path) -> None:
    """And a request for a model without a replica is told at once, long before the next reading is due."""
    root = tmp_path / "registry"
    root.write_text("no directory, as after a file system's failure")
    says, called, read = [load(1.0)], asyncio.Event(), asyncio.Event()
    async with DirectoryRegistry(root) as registry, asyncio.TaskGroup() as tasks:
        running = tasks.create_task(LoadBoard("one", registry, lambda now_s: tuple(says), called, lambda loads: read.set()).run())
        await asyncio.wait_for(read.wait(), 5)
        with pytest.raises(Unavailable):
            await registry.write("probe", b"")
        root.unlink()
        await told(registry, 1.0)
        says[:] = [load(2.0)]
        called.set()
        await told(registry, 2.0)
        running.cancel()
        await asyncio.wait((running,))
        assert await registry.read(load_key("one")) is None


async def told(registry: DirectoryRegistry, need: float) -> None:
    """Returns once the board says so."""
    async with asyncio.timeout(10):
        async for documents in registry.watch_documents(LOADS):
            if documents and decode_loads(documents[load_key("one")])[0].predicted_replicas == need:
                return


async def test_scaling_goes_on_after_an_outage(tmp_path: Path, registry: DirectoryRegistry) -> None:
    root, aside = tmp_path / "registry", tmp_path / "aside"
    await want(registry, 0)
    async with scaler(root, "one"):
        await tell(registry, "one", load(num_open=1))
        await wanted(registry, 1)
        root.rename(aside)
        root.write_text("")
        with pytest.raises(Unavailable):
            await registry.write("probe", b"")
        root.unlink()
        aside.rename(root)
        await want(registry, 0)
        await tell(registry, "one", load(0.5, num_open=1))
        await wanted(registry, 1)


async def test_a_request_waits_for_the_group_that_it_starts(tmp_path: Path) -> None:
    """Longer than requests wait for a group that is merely lost, and the lane tells of it at once."""
    spec = replace(ECHO, scaling=Scaling(0, 2))
    async with orchestrator_bench(tmp_path, spec, group_wait_s=0.05) as bench:
        with pytest.raises(Unavailable):
            await bench.infer("early", timeout_s=5)
        await want(bench.registry, 0, spec.revision)
        async with asyncio.timeout(10):
            while not bench.dispatcher.has_dormant:
                await asyncio.sleep(0.005)
        async with asyncio.TaskGroup() as tasks:
            asked = tasks.create_task(bench.infer("first", b"abc", timeout_s=30))
            await asyncio.wait_for(bench.dispatcher.called.wait(), 10)
            assert bench.dispatcher.loads(asyncio.get_running_loop().time())[0].is_called
            await want(bench.registry, 1, spec.revision)
            done, _ = await asyncio.wait((asked,), timeout=0.3)
            assert not done and bench.dispatcher.has_dormant
            await bench.add_leader("g", spec=spec)
        assert asked.result() == b"abc" and not bench.dispatcher.has_dormant

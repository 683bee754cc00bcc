"""The directory registry with real processes, locks and kills. The same promises are what the Consul adapter must keep."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tensorway.errors import FailedPrecondition, InvalidRequest, Unavailable
from tensorway.registry import open_registry
from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import Registration

OWNER = """
import asyncio, sys
from tensorway.registry import open_registry
from tensorway.registry.port import Registration

async def main():
    registry = open_registry(sys.argv[1])
    await registry.register(Registration("group", "g/1", "127.0.0.1:9", {"model": "m"}))
    assert await registry.claim("m/r/0", "owner") is not None
    print("held", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[DirectoryRegistry]:
    async with DirectoryRegistry(tmp_path / "registry") as opened:
        yield opened


def start_owner(registry: DirectoryRegistry, tmp_path: Path) -> subprocess.Popen[bytes]:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, f"directory:{tmp_path / 'registry'}"], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"held\n"
    owner.stdout.close()
    return owner


async def test_a_killed_owner_loses_registration_and_claim_at_once(registry: DirectoryRegistry, tmp_path: Path) -> None:
    owner = await asyncio.to_thread(start_owner, registry, tmp_path)
    assert await registry.claim("m/r/0", "me") is None
    seen: list[tuple[Registration, ...]] = []
    async with asyncio.timeout(10):
        async for registrations in registry.watch("group"):
            seen.append(registrations)
            if not registrations:
                break
            owner.kill()
    await asyncio.to_thread(owner.wait)
    assert seen == [(Registration("group", "g/1", "127.0.0.1:9", {"model": "m"}),), ()]
    assert await registry.claim("m/r/0", "me") is not None


async def test_a_stopped_owner_keeps_what_it_holds(registry: DirectoryRegistry, tmp_path: Path) -> None:
    owner = await asyncio.to_thread(start_owner, registry, tmp_path)
    os.kill(owner.pid, signal.SIGSTOP)
    try:
        assert await registry.claim("m/r/0", "me") is None
        assert len(await registry.registrations("group")) == 1
    finally:
        owner.kill()
        await asyncio.to_thread(owner.wait)


async def test_a_live_id_cannot_be_registered_twice(registry: DirectoryRegistry) -> None:
    lease = await registry.register(Registration("node", "n", "a:1"))
    with pytest.raises(FailedPrecondition, match="already registered"):
        await registry.register(Registration("node", "n", "a:2"))
    await lease.release()
    await lease.release()
    await registry.register(Registration("node", "n", "a:2"))
    assert [row.endpoint for row in await registry.registrations("node")] == ["a:2"]


async def test_watchers_see_updates_and_releases_in_order(registry: DirectoryRegistry) -> None:
    lease = await registry.register(Registration("node", "n", "a:1", {"state": "one"}))
    states: list[str] = []
    async with asyncio.timeout(10):
        async for registrations in registry.watch("node"):
            states.append(registrations[0].metadata["state"] if registrations else "gone")
            if states[-1] == "one":
                await lease.update(Registration("node", "n", "a:1", {"state": "two"}))
            elif states[-1] == "two":
                await lease.release()
            else:
                break
    assert states == ["one", "two", "gone"]


async def test_an_update_never_shows_half_a_row(registry: DirectoryRegistry) -> None:
    lease = await registry.register(Registration("node", "n", "a:1", {"text": "x"}))
    for number in range(300):
        length = 1 + number * 7919 % 5000
        update = asyncio.ensure_future(lease.update(Registration("node", "n", "a:1", {"text": "y" * length})))
        for row in await registry.registrations("node"):
            assert set(row.metadata["text"]) <= {"x", "y"}
            assert len(set(row.metadata["text"])) == 1
        await update


async def test_documents(registry: DirectoryRegistry) -> None:
    key = "revisions/model with spaces/…/abc"
    assert await registry.read(key) is None
    assert await registry.create(key, b"1")
    assert not await registry.create(key, b"2")
    await registry.write(key, b"3")
    await registry.write("other/x", b"unseen")
    async with asyncio.timeout(10):
        async for documents in registry.watch_documents("revisions/"):
            if not documents:
                break
            assert documents == {key: b"3"}
            await registry.delete(key)


async def test_a_claim_names_its_holder_to_all(registry: DirectoryRegistry) -> None:
    lease = await registry.claim("m/r/0", "first")
    assert lease is not None
    assert await registry.claim("m/r/0", "second") is None
    async with asyncio.timeout(10):
        async for claims in registry.watch_claims("m/"):
            if not claims:
                break
            assert claims == {"m/r/0": "first"}
            await lease.release()


async def test_many_contenders_one_winner(tmp_path: Path) -> None:
    registries = [DirectoryRegistry(tmp_path) for _ in range(20)]
    leases = await asyncio.gather(*(each.claim("k", str(number)) for number, each in enumerate(registries)))
    assert sum(lease is not None for lease in leases) == 1
    for each in registries:
        await each.close()


async def test_closing_releases_everything(tmp_path: Path) -> None:
    async with DirectoryRegistry(tmp_path) as first:
        await first.register(Registration("node", "n", "a:1"))
        await first.claim("k", "me")
    async with DirectoryRegistry(tmp_path) as second:
        assert await second.registrations("node") == ()
        assert await second.claim("k", "you") is not None
    assert not list((tmp_path / "registrations" / "node").iterdir())


async def test_bad_places_and_values_are_one_clear_error(tmp_path: Path, registry: DirectoryRegistry) -> None:
    with pytest.raises(InvalidRequest, match="directory:PATH"):
        open_registry("zookeeper:somewhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot be made"):
        await DirectoryRegistry(tmp_path / "file" / "below").register(Registration("node", "n", "a:1"))
    with pytest.raises(FailedPrecondition, match="bytes, more than"):
        await registry.write("k", b"x" * (600 * 1024))


async def test_a_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(FailedPrecondition, match="can be written by others"):
        await DirectoryRegistry(shared).register(Registration("node", "n", "a:1"))


async def test_a_watch_leaves_no_descriptor_behind(registry: DirectoryRegistry) -> None:
    await registry.register(Registration("node", "n", "a:1"))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        watch = registry.watch("node")
        assert len(await anext(watch)) == 1
        await watch.aclose()
    assert len(os.listdir("/proc/self/fd")) == before

"""What is the directory registry's own: locks, files, descriptors. What every registry promises is in tests/contract/registry."""

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


async def test_a_stopped_owner_keeps_what_it_holds(registry: DirectoryRegistry, tmp_path: Path) -> None:
    owner = await asyncio.to_thread(start_owner, registry, tmp_path)
    os.kill(owner.pid, signal.SIGSTOP)
    try:
        assert await registry.claim("m/r/0", "me") is None
        assert len(await registry.registrations("group")) == 1
    finally:
        owner.kill()
        await asyncio.to_thread(owner.wait)


async def test_an_update_never_shows_half_a_row(registry: DirectoryRegistry) -> None:
    lease = await registry.register(Registration("node", "n", "a:1", {"text": "x"}))
    for number in range(300):
        length = 1 + number * 7919 % 5000
        update = asyncio.ensure_future(lease.update(Registration("node", "n", "a:1", {"text": "y" * length})))
        for row in await registry.registrations("node"):
            assert set(row.metadata["text"]) <= {"x", "y"}
            assert len(set(row.metadata["text"])) == 1
        await update


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

"""One group over two nodes in two network namespaces, joined by a virtual cable: nothing but that cable is shared, besides the registry."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tensorway import AsyncClient
from tensorway.cli.local_mesh import MODULES, flags_of
from tensorway.errors import TensorwayError
from tensorway.process import MALLOC_SETTINGS
from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import GROUP, NODE, NODES
from tests.contract.registry.views import together
from tests.unit.node.supervised import chain, gone

RECOVERY_S = 40.0
_ADDRESSES = ("192.0.2.1", "192.0.2.2")


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False, timeout=10)


@dataclass(frozen=True)
class Side:
    """One network namespace and its end of the cable."""

    namespace: str
    interface: str
    address: str


@contextmanager
def joined(letter: str) -> Iterator[tuple[Side, Side]]:
    """Two namespaces joined by a veth pair while the block runs; `letter` tells pairs apart. Skips where namespaces may not be made."""
    mark = f"{os.getpid() % 100_000}{letter}"
    made = tuple(Side(f"tw{mark}-{index}", f"tw{mark}v{index}", address) for index, address in enumerate(_ADDRESSES))
    try:
        for side in made:
            outcome = _ip("netns", "add", side.namespace)
            if outcome.returncode:
                pytest.skip(f"network namespaces cannot be made here: {outcome.stderr.strip()}")
        first, second = made
        steps = [("link", "add", first.interface, "netns", first.namespace, "type", "veth",
                  "peer", "name", second.interface, "netns", second.namespace)]
        for side in made:
            inside = ("-n", side.namespace)
            steps += [(*inside, "addr", "add", f"{side.address}/24", "dev", side.interface),
                      (*inside, "link", "set", side.interface, "up"), (*inside, "link", "set", "lo", "up")]
        for step in steps:
            outcome = _ip(*step)
            if outcome.returncode:
                pytest.skip(f"`ip {' '.join(step)}` is not permitted here: {outcome.stderr.strip()}")
        yield first, second
    finally:
        for side in made:
            _ip("netns", "del", side.namespace)


@dataclass
class SplitMesh:
    """Services in two namespaces, met through one registry directory."""

    folder: Path
    registry: DirectoryRegistry
    models_dir: Path
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        """The gateway's, which is a path and so can be reached from every namespace."""
        return f"unix:{self.folder}/gateway.sock"

    async def start(self, side: Side, name: str, service: str) -> asyncio.subprocess.Process:
        flags: dict[str, object] = {
            "id": name, "registry": f"directory:{self.folder / 'registry'}", "listen": f"{side.address}:0", "ops_listen": "off",
            "log_format": "json",
        }
        if service == "gateway":
            flags["listen"] = self.endpoint
        if service == "node":
            flags |= {
                "models_dir": str(self.models_dir), "rank_listen": f"{side.address}:0", "rank_interface": side.interface,
                "heartbeat_s": 0.2, "hung_after_s": 3.0, "grace_s": 5.0,
            }
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = process = await asyncio.create_subprocess_exec(
                "ip", "netns", "exec", side.namespace, sys.executable, "-m", MODULES[service], *flags_of(flags),
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env={**MALLOC_SETTINGS, **os.environ}, start_new_session=True,
            )
        return process

    async def ready(self, client: AsyncClient, epoch: int) -> dict[str, str]:
        """Returns the group's registration once it serves in that epoch or a later one."""
        async with asyncio.timeout(RECOVERY_S):
            while True:
                for group in await self.registry.registrations(GROUP):
                    try:
                        if int(group.metadata["epoch"]) >= epoch and (await client.model("chain")).is_ready and await client.is_ready():
                            return dict(group.metadata)
                    except TensorwayError:
                        break  # the gateway is not there yet, or has not heard of the model
                await asyncio.sleep(0.1)

    async def reason(self, client: AsyncClient, words: str) -> str:
        """Why the model is not ready, once that holds `words`."""
        async with asyncio.timeout(RECOVERY_S):
            while words not in (found := (await client.model("chain")).reason):
                await asyncio.sleep(0.05)
        return found

    async def ranks(self) -> dict[str, int]:
        """Process ids by node, as the owner's document says."""
        found: dict[str, int] = {}
        for node in await self.registry.registrations(NODE):
            document = json.loads(await self.registry.read(f"{NODES}{node.id}") or b"{}")
            for group in document.get("groups", ()):
                found |= {rank["node"]: rank["pid"] for rank in group["ranks"]}
        return found

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-6000:]}" for path in sorted(self.folder.glob("*.log")))


@asynccontextmanager
async def split_mesh(folder: Path) -> AsyncIterator[SplitMesh]:
    chain(folder / "models", "{pipeline: 2, nodes: 2}")
    async with AsyncExitStack() as stack:
        mesh = SplitMesh(folder, await stack.enter_async_context(DirectoryRegistry(folder / "registry")), folder / "models")
        try:
            yield mesh
        except BaseException:
            print(mesh.logs())
            raise
        finally:
            for process in mesh.processes.values():
                if process.returncode is None:
                    process.kill()
                await process.wait()


async def test_a_group_over_two_network_namespaces_survives_its_guest_and_a_cut_cable(tmp_path: Path) -> None:
    """Each in a mesh of its own; at once, because both wait for silence to be noticed."""
    with joined("a") as first, joined("b") as second:
        await together(
            _serves_and_survives_its_guest(tmp_path / "a", *first), _a_cut_cable_ends_the_epoch_on_both_sides(tmp_path / "b", *second)
        )


async def _serves_and_survives_its_guest(folder: Path, here: Side, there: Side) -> None:
    async with split_mesh(folder) as mesh, AsyncClient(mesh.endpoint) as client:
        await mesh.start(here, "gateway", "gateway")
        await mesh.start(here, "orchestrator", "orchestrator")
        await mesh.start(here, "node-1", "node")
        guest = await mesh.start(there, "node-2", "node")
        await mesh.ready(client, 1)
        ranks = await mesh.ranks()
        assert ranks.keys() == {"node-1", "node-2"}
        await answers(client)

        # Its own ranks are on the other node as much as the guest's: whichever node owns the group, node-2 takes a rank with it.
        guest.kill()
        await gone(*ranks.values())
        why = await mesh.reason(client, "no free partner")
        assert "other live node" in why

        await mesh.start(there, "node-3", "node")
        await mesh.ready(client, 1)
        assert (await mesh.ranks()).keys() == {"node-1", "node-3"}
        await answers(client)


async def _a_cut_cable_ends_the_epoch_on_both_sides(folder: Path, here: Side, there: Side) -> None:
    """No packet says that the other is gone: only silence does."""
    async with split_mesh(folder) as mesh, AsyncClient(mesh.endpoint) as client:
        await mesh.start(here, "gateway", "gateway")
        await mesh.start(here, "orchestrator", "orchestrator")
        await mesh.start(here, "node-1", "node")
        await mesh.start(there, "node-2", "node")
        before = await mesh.ready(client, 1)
        ranks = await mesh.ranks()
        assert not _ip("-n", there.namespace, "link", "set", there.interface, "down").returncode
        await gone(*ranks.values())
        await mesh.reason(client, f"epoch {before['epoch']}: rank")
        assert not _ip("-n", there.namespace, "link", "set", there.interface, "up").returncode
        await mesh.ready(client, int(before["epoch"]) + 1)
        assert not set(ranks.values()) & set((await mesh.ranks()).values())


async def answers(client: AsyncClient) -> None:
    """The chain of two adds two, whatever rank each of them is on."""
    for rows in (1, 3, 4):
        sent = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)
        got = (await client.infer("chain", {"x": sent}, timeout_s=30))["x"]
        np.testing.assert_array_equal(got, sent + 2)

"""A whole mesh whose hosts, processes and registry can be hurt: gateways, orchestrators, nodes, and three Consul servers or a directory."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tensorway import AsyncClient
from tensorway.cli.local_mesh import flags_of
from tensorway.errors import TensorwayError
from tensorway.registry import open_registry
from tensorway.registry.port import GATEWAY, GROUP, NODE, NODES, ORCHESTRATOR, Registration, Registry
from tensorway.transport.channel import check_health
from tests.chaos.fleet import Fleet
from tests.chaos.hosts import PREFIX, Hosts, mount_small, open_hosts, unmount
from tests.chaos.processes import MARK, Member, cpu_ticks, end_leftovers, end_marked
from tests.chaos.servers import missing_server
from tests.consul.agent import Agent, Cluster, Place, cluster

#: Ports of each service: gRPC, ops.
_PORTS: Final = {GATEWAY: (8001, 8002), ORCHESTRATOR: (8011, 8012), NODE: (8021, 8022)}
_LOOK_S: Final = 0.2
#: A node that drains hands over to another, which may have to start a model: as long as by default.
_GRACE_S: Final = 30.0
#: Of the file system that holds a registry directory.
REGISTRY_BYTES: Final = 2 * 1024**2


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a mesh is, and what it meets in."""

    #: `consul` or `directory`.
    registry: str
    fleet: Fleet
    num_gateways: int = 2
    num_orchestrators: int = 2
    num_nodes: int = 3
    num_consuls: int = 3

    def names(self, service: str) -> tuple[str, ...]:
        """Members of a service; `consul` for its servers."""
        numbers = {GATEWAY: self.num_gateways, ORCHESTRATOR: self.num_orchestrators, NODE: self.num_nodes}
        numbers["consul"] = self.num_consuls if self.registry == "consul" else 0
        return tuple(f"{service}-{index}" for index in range(1, numbers[service] + 1))


@dataclass(slots=True, eq=False)
class World:
    """A running mesh."""

    shape: Shape
    hosts: Hosts
    folder: Path
    registry_url: str
    #: This process's own view.
    registry: Registry
    cluster: Cluster | None = None
    members: dict[str, Member] = field(default_factory=dict)
    #: The servers of the cluster, by host.
    servers: dict[str, Agent] = field(default_factory=dict)
    #: CPU ticks of services and leaders while nothing was wrong: a fault should strike those who do the work. A node has its ranks'.
    work: dict[int, int] = field(default_factory=dict)

    @property
    def mark(self) -> str:
        return self.folder.name

    @property
    def registry_dir(self) -> Path:
        return self.folder / "registry"

    def of(self, service: str) -> list[Member]:
        return [member for member in self.members.values() if member.service == service]

    def gateways(self) -> list[str]:
        return [member.endpoint for member in self.of(GATEWAY)]

    async def groups(self) -> tuple[Registration, ...]:
        return await self.registry.registrations(GROUP)

    async def rank_pids(self) -> set[int]:
        """Process ids of all ranks, as their nodes tell."""
        found = set()
        for node in self.of(NODE):
            document = json.loads(await self.registry.read(f"{NODES}{node.name}") or b"{}")
            found |= {int(rank["pid"]) for group in document.get("groups", ()) for rank in group.get("ranks", ()) if rank.get("pid")}
        return found

    async def note_work(self, seconds: float) -> None:
        """Sees for so long who works how much."""
        leaders = {int(group.metadata["pid"]): group.metadata["node"] for group in await self.groups()}
        services = {member.pid: member.name for member in self.members.values() if member.is_running}
        before = {pid: cpu_ticks(pid) for pid in (*leaders, *services)}
        await asyncio.sleep(seconds)
        self.work = {pid: cpu_ticks(pid) - ticks for pid, ticks in before.items()}
        for pid, node in leaders.items():
            if node in self.members and self.members[node].is_running:
                self.work[self.members[node].pid] += self.work[pid]

    async def missing(self) -> str:
        """What the mesh still lacks to be whole; empty where it lacks nothing."""
        for member in self.members.values():
            if not member.is_running:
                return f"{member.name} does not run"
        if lack := await missing_server(self.servers):
            return lack
        try:
            for kind in (GATEWAY, ORCHESTRATOR, NODE):
                known = {registration.id for registration in await self.registry.registrations(kind)}
                if lacking := {member.name for member in self.of(kind)} - known:
                    return f"{', '.join(sorted(lacking))} not registered"
            groups = await self.groups()
            if len(groups) != self.shape.fleet.num_groups:
                return f"{len(groups)} of {self.shape.fleet.num_groups} groups registered"
            if crowded := self._crowded(groups):
                return crowded
            for member in (*self.of(ORCHESTRATOR), *self.of(GATEWAY)):
                if (status := await check_health(member.endpoint, "", 2.0)) != "SERVING":
                    return f"{member.name} is {status}"
            for member in self.of(GATEWAY):
                if lack := await self._missing_at(member):
                    return lack
        except TensorwayError as error:
            return f"not all can be reached: {error}"
        return ""

    def _crowded(self, groups: Sequence[Registration]) -> str:
        """A node with two replicas of a model of which another has none: one fault would take both. Empty where there is none such."""
        held = Counter((group.metadata["model"], group.metadata["node"]) for group in groups)
        for (model, node), number in held.items():
            if number > 1 and any((model, other.name) not in held for other in self.of(NODE)):
                return f"{node} holds {number} replicas of {model}, another node none"
        return ""

    async def _missing_at(self, gateway: Member) -> str:
        async with AsyncClient(gateway.endpoint, retries=0, timeout_s=2.0) as client:
            described = {model.name: model for model in await client.models()}
        for name, number in self.shape.fleet.replicas:
            if name not in described or described[name].num_ready_replicas != number:
                return f"{gateway.name} knows {described[name].num_ready_replicas if name in described else 'no'} of {number} {name}"
        return ""

    async def wait_whole(self, patience_s: float) -> str:
        """Returns what is still missing after that time; empty as soon as nothing is."""
        return await _until_empty(self.missing, patience_s)

    async def wait_ready(self, patience_s: float) -> str:
        """Returns which service does not say that it is SERVING after that time; empty as soon as all do."""
        return await _until_empty(self._unready, patience_s)

    async def _unready(self) -> str:
        for member in self.members.values():
            try:
                if (status := await check_health(member.endpoint, "", 2.0)) != "SERVING":
                    return f"{member.name} is {status}"
            except TensorwayError as error:
                return f"{member.name} cannot be reached: {error}"
        return ""

    def logs(self, num_bytes: int = 3000) -> str:
        return "\n".join(f"== {member.name}\n{member.last_lines(num_bytes)}" for member in self.members.values())

    async def _start(self, models: Path) -> None:
        for service in (GATEWAY, ORCHESTRATOR, NODE):
            for name in self.shape.names(service):
                self.members[name] = self._member(name, service, models)
        for member in self.members.values():
            await member.start()

    def _member(self, name: str, service: str, models: Path) -> Member:
        host = self.hosts[name]
        port, ops_port = _PORTS[service]
        flags: dict[str, object] = {
            "id": name, "registry": self.registry_url, "listen": f"{host.address}:{port}", "ops_listen": f"{host.address}:{ops_port}",
            "advertise_host": host.address, "log_format": "json", "grace_s": _GRACE_S,
        }
        if service == NODE:
            flags |= {"models_dir": models, "rank_listen": f"{host.address}:0", "threads": 1, "spread_wait_s": 1.0}
        log, mark = self.folder / f"{name}.log", {MARK: self.mark}
        return Member(name, service, host, f"{host.address}:{port}", flags_of(flags), log, mark)

    async def _end(self) -> None:
        """Everything ends, whatever state it is in."""
        for member in self.members.values():
            member.send_signal(signal.SIGCONT)
            member.send_signal(signal.SIGKILL)
        end_marked(self.mark, [server.process.pid for server in self.servers.values() if server.process is not None])
        for member in self.members.values():
            if member.process is not None:
                await member.process.wait()


@asynccontextmanager
async def open_world(shape: Shape, keep: Path | None = None) -> AsyncIterator[World]:
    """A mesh, started but not yet whole. All of it is gone with the block; the logs stay in `keep`."""
    end_leftovers()
    names = [name for service in (GATEWAY, ORCHESTRATOR, NODE, "consul") for name in shape.names(service)]
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{PREFIX}-{os.getpid()}-", ignore_cleanup_errors=True)))
        os.environ[MARK] = folder.name  # Consul's servers inherit it
        hosts = stack.enter_context(open_hosts(names))
        world = World(shape, hosts, folder, f"directory:{folder / 'registry'}", registry=open_registry(f"directory:{folder / 'registry'}"))
        if shape.registry == "consul":
            await _open_cluster(world, stack)
        elif hosts.has_network:  # root, that is: a file system of its own, which can be filled
            mount_small(world.registry_dir, REGISTRY_BYTES)
            stack.callback(unmount, world.registry_dir)
        stack.push_async_callback(world.registry.close)
        stack.push_async_callback(world._end)
        try:
            await world._start(shape.fleet.write(folder / "models"))
            yield world
        finally:
            if keep is not None:
                _keep_logs(folder, keep)


async def _until_empty(lacking: Callable[[], Awaitable[str]], patience_s: float) -> str:
    """What it says last: nothing, or what it still says after that time."""
    lack = "not looked yet"
    try:
        async with asyncio.timeout(patience_s):
            while lack := await lacking():
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        return lack
    return ""


async def _open_cluster(world: World, stack: AsyncExitStack) -> None:
    places = [Place(world.hosts[name].address, world.hosts[name].prefix) for name in world.shape.names("consul")]
    made = await stack.enter_async_context(cluster(world.folder / "consul", places=places))
    world.cluster = made
    world.servers = dict(zip(world.shape.names("consul"), made.servers, strict=True))
    world.registry_url = made.registry_url()
    world.registry = open_registry(world.registry_url)


def _keep_logs(folder: Path, keep: Path) -> None:
    keep.mkdir(parents=True, exist_ok=True)
    for path in (*folder.glob("*.log"), *folder.glob("consul/*/log")):
        name = path.name if path.suffix else f"{path.parent.name}.log"
        (keep / name).write_bytes(path.read_bytes())

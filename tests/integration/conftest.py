"""A whole mesh of real processes: gateways, orchestrators and nodes, with a directory registry in a temporary folder, or another one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tensorway import AsyncClient
from tensorway.cli.local_mesh import LocalMesh, Member, MemberPlan, flags_of
from tensorway.errors import TensorwayError
from tensorway.registry import open_registry
from tensorway.registry.port import GATEWAY, GROUP, Registration, Registry
from tensorway.tls import ROLE_OF_KIND, Tls

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models"
TEST_MODELS = ROOT / "tests" / "models"


@dataclass(eq=False)
class Mesh:
    """A running mesh and how to reach and to hurt it."""

    processes: LocalMesh
    registry: Registry
    registry_url: str
    models_dir: Path
    settings: Mapping[str, object]
    endpoint: str = ""
    #: Certificates by role, as `tensorway certs` writes them; None: in the clear.
    certs: Path | None = None

    @property
    def tls(self) -> Tls | bool:
        """For clients."""
        return False if self.certs is None else Tls(ca=str(self.certs / "ca.pem"))

    async def start(self, name: str, service: str, **more: object) -> Member:
        """Starts one more member, named `name` in the registry too."""
        flags = {"id": name, "registry": self.registry_url, "listen": "127.0.0.1:0", "ops_listen": "127.0.0.1:0", "log_format": "json"}
        if self.certs is not None:
            role = self.certs / ROLE_OF_KIND[service]
            # Local links need no certificate; all hops are to have one.
            flags |= {"tls_cert": f"{role}.pem", "tls_key": f"{role}.key", "tls_ca": str(self.certs / "ca.pem"), "local_links": "false"}
        if service == "node":
            flags |= {"models_dir": str(self.models_dir), "spread_wait_s": 10.0, **self.settings}
        return await self.processes.start_member(MemberPlan(name, service, flags_of({**flags, **more})))

    async def members(self, kind: str) -> tuple[Registration, ...]:
        return await self.registry.registrations(kind)

    async def wait_members(self, kind: str, count: int) -> tuple[Registration, ...]:
        """Returns once exactly `count` members of `kind` live."""
        async with asyncio.timeout(60):
            async for found in self.registry.watch(kind):
                if len(found) == count:
                    return found
        raise AssertionError("a watch never ends")

    async def wait_ready(self, *models: str) -> None:
        """Returns once the gateway is ready and the models are served."""
        (gateway, *_) = await self.wait_members(GATEWAY, 1)
        self.endpoint = gateway.endpoint
        async with asyncio.timeout(max(90, 45 * len(models))), AsyncClient(self.endpoint, tls=self.tls) as client:
            while True:
                try:
                    ready = {model.name for model in await client.models() if model.is_ready}
                    if ready >= set(models) and await client.is_ready():
                        return
                except TensorwayError:
                    pass
                for member in self.processes.members.values():
                    assert member.process.returncode is None, member.last_lines()
                await asyncio.sleep(0.05)

    async def leaders(self) -> tuple[Registration, ...]:
        return await self.members(GROUP)

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-6000:]}" for path in sorted(self.processes.log_dir.glob("*.log")))


@asynccontextmanager
async def running_mesh(
    path: Path, *models: str, models_dir: Path = MODELS, orchestrators: int = 1, nodes: int = 1, registry_url: str = "",
    certs: Path | None = None, **settings: object,
) -> AsyncIterator[Mesh]:
    """A mesh with `models` served, with TLS where there are `certs`, on a directory unless `registry_url` says otherwise. What it
    printed is shown when the block fails."""
    url = registry_url or f"directory:{path / 'registry'}"
    async with AsyncExitStack() as stack:
        processes = await stack.enter_async_context(LocalMesh(path / "logs", grace_s=20))
        registry = open_registry(url)
        stack.push_async_callback(registry.close)
        names = '["' + '","'.join(models) + '"]'
        mesh = Mesh(processes, registry, url, models_dir, {"models": names, **settings}, certs=certs)
        try:
            await mesh.start("gateway-1", "gateway")
            for number in range(orchestrators):
                await mesh.start(f"orchestrator-{number + 1}", "orchestrator")
            for number in range(nodes):
                await mesh.start(f"node-{number + 1}", "node")
            await mesh.wait_ready(*models)
            yield mesh
        except BaseException:
            print(mesh.logs())
            raise


@pytest.fixture
def mesh_dir(tmp_path: Path) -> Path:
    return tmp_path

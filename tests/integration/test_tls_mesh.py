"""A whole mesh with certificates on every hop, its certificates renewed under load, and what strangers reach of it."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import subprocess
import sysconfig
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from tensorway import AsyncClient, Tls
from tensorway.cli.certs import Authority
from tensorway.errors import PermissionDenied, TensorwayError, Unavailable
from tensorway.registry.port import GROUP, NODE, NODES, ORCHESTRATOR, Registration
from tensorway.tls import GATEWAY, ROLES, WORKER, MeshTls, TlsFiles
from tensorway.transport import AsyncChannel
from tests.unit.node.supervised import chain

from .conftest import Mesh, running_mesh

pytestmark = [pytest.mark.asyncio(loop_scope="module")]

TENSORWAY = Path(sysconfig.get_path("scripts")) / "tensorway"
MODEL = "chain"
VALID = datetime.timedelta(hours=1)
_SOON_S = 20.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    """A group of two ranks over two nodes: every kind of hop there is."""
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority.open_or_make(folder / "certs")
    for role in ROLES:
        authority.issue(role, ("localhost", "127.0.0.1") if role == GATEWAY else (), VALID)
    chain(folder / "models", "{pipeline: 2, nodes: 2}")
    async with running_mesh(
        folder, MODEL, models_dir=folder / "models", nodes=2, certs=folder / "certs", rank_interface="lo", grace_s=4.0
    ) as made:
        yield made


async def answered(client: AsyncClient) -> None:
    sent = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal((await client.infer(MODEL, {"x": sent}, timeout_s=30))["x"], sent + 2)


async def test_a_request_crosses_every_hop(mesh: Mesh) -> None:
    async with AsyncClient(mesh.endpoint, tls=mesh.tls) as client:
        await answered(client)


@pytest.mark.parametrize("trust", ["clear", "system", "strange"])
async def test_a_client_that_trusts_another_or_nobody_gets_nowhere(mesh: Mesh, trust: str, tmp_path: Path) -> None:
    Authority.open_or_make(tmp_path)
    tls = {"clear": False, "system": True, "strange": Tls(ca=str(tmp_path / "ca.pem"))}[trust]
    async with AsyncClient(mesh.endpoint, tls=tls, retries=0) as client:
        with pytest.raises(Unavailable):
            await client.models()


async def test_what_a_stranger_reaches_of_each_member(mesh: Mesh) -> None:
    """Nothing without a certificate; with a right one of the wrong role, nothing that is not for it."""
    worker, gateway = _tls(mesh, WORKER), _tls(mesh, GATEWAY)
    (orchestrator,), (group,) = await mesh.members(ORCHESTRATOR), await mesh.members(GROUP)
    nodes = await mesh.members(NODE)
    for member in (orchestrator, group, *nodes):
        with pytest.raises(Unavailable):
            await _call(member, None, "/grpc.health.v1.Health/Check")
        assert await _call(member, worker, "/grpc.health.v1.Health/Check") == b"\x08\x01"
    for member, caller, method in (
        (orchestrator, worker, "/tensorway.v1.InferenceService/Infer"), (group, gateway, "/tensorway.v1.InferenceService/Infer"),
        (nodes[0], gateway, "/tensorway.v1.NodeService/AdaptModel"), (nodes[0], gateway, "/tensorway.v1.NodeService/RunRanks"),
        (orchestrator, worker, "/tensorway.v1.LinkService/Open"), (group, gateway, "/tensorway.v1.LinkService/Open"),
    ):
        with pytest.raises(PermissionDenied, match="the certificate shown is of"):
            await _stream(member, caller, method)


async def test_no_rank_listens_for_strangers(mesh: Mesh) -> None:
    """Once a group serves, its ranks' only listening socket is the leader's, which asks for a certificate."""
    (group,) = await mesh.members(GROUP)
    pids = await _rank_pids(mesh)
    assert len(pids) == 2
    listening = {port for pid in pids for port in _listening_ports(pid)}
    assert listening == {int(group.endpoint.rpartition(":")[2])}


async def test_the_command_line_takes_certificates_from_its_options_or_the_environment(mesh: Mesh) -> None:
    assert mesh.certs is not None
    ca, operator = str(mesh.certs / "ca.pem"), str(mesh.certs / "operator")
    listed = await _command("--tls-ca", ca, "models", "list", "--endpoint", mesh.endpoint)
    assert listed.returncode == 0
    assert MODEL in listed.stdout
    environment = {"TENSORWAY_TLS_CA": ca, "TENSORWAY_TLS_CERT": f"{operator}.pem", "TENSORWAY_TLS_KEY": f"{operator}.key"}
    healthy = await _command("doctor", "--registry", mesh.registry_url, "--endpoint", mesh.endpoint, **environment)
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    refused = await _command("models", "list", "--endpoint", mesh.endpoint)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr


async def test_the_mesh_moves_to_other_certificates_under_load_without_a_failure(mesh: Mesh) -> None:
    """All members' files are renewed while requests run; then a member that comes anew meets them all, and a killed leader's group forms
    again."""
    assert mesh.certs is not None
    failures: list[TensorwayError] = []
    is_over = asyncio.Event()

    async def load(client: AsyncClient) -> None:
        while not is_over.is_set():
            try:
                await answered(client)
            except TensorwayError as error:
                failures.append(error)

    async with AsyncClient(mesh.endpoint, tls=mesh.tls) as client, asyncio.TaskGroup() as tasks:
        tasks.create_task(load(client))
        authority = Authority.open_or_make(mesh.certs)
        before = (mesh.certs / "gateway.pem").read_bytes()
        for role in ROLES:
            authority.issue(role, ("localhost", "127.0.0.1") if role == GATEWAY else (), VALID)
        assert (mesh.certs / "gateway.pem").read_bytes() != before
        await mesh.start("orchestrator-2", "orchestrator")
        await mesh.wait_members(ORCHESTRATOR, 2)
        await _logged(mesh, "certificates read anew", {"gateway-1"})
        await answered(client)
        is_over.set()
    assert failures == []


async def test_a_member_with_another_authoritys_certificate_finds_no_way_in(mesh: Mesh, tmp_path: Path) -> None:
    strange = Authority.open_or_make(tmp_path)
    for role in ROLES:
        strange.issue(role, ("localhost", "127.0.0.1"), VALID)
    own, mesh.certs = mesh.certs, tmp_path
    try:
        gateway = await mesh.start("gateway-2", "gateway")
        await mesh.wait_members(GATEWAY, 2)
    finally:
        mesh.certs = own
    (endpoint,) = [member.endpoint for member in await mesh.members(GATEWAY) if member.id == "gateway-2"]
    async with AsyncClient(endpoint, tls=Tls(ca=str(tmp_path / "ca.pem")), retries=0) as client:
        with pytest.raises(Unavailable, match="no orchestrator is connected"):
            await client.infer(MODEL, {"x": np.zeros((1, 2), np.float32)}, timeout_s=30)
    await mesh.processes.stop_member(gateway)


def _tls(mesh: Mesh, role: str) -> MeshTls:
    assert mesh.certs is not None
    own = mesh.certs / role
    return MeshTls(TlsFiles(cert=f"{own}.pem", key=f"{own}.key", ca=str(mesh.certs / "ca.pem")))


async def _call(member: Registration, tls: MeshTls | None, method: str) -> bytes:
    channel = AsyncChannel(member.endpoint, tls=None if tls is None else tls.dial(member.kind))
    try:
        return (await channel.unary(method, b"", _SOON_S)).response
    finally:
        await channel.close()


async def _stream(member: Registration, tls: MeshTls, method: str) -> None:
    channel = AsyncChannel(member.endpoint, tls=tls.dial(member.kind))
    stream = channel.stream(method)
    try:
        async with asyncio.timeout(_SOON_S):
            await stream.write(b"")
            await stream.read()
    finally:
        await stream.cancel()
        await channel.close()


async def _rank_pids(mesh: Mesh) -> list[int]:
    found: set[int] = set()
    for node in await mesh.members(NODE):
        document = json.loads(await mesh.registry.read(f"{NODES}{node.id}") or b"{}")
        found |= {rank["pid"] for group in document.get("groups", ()) for rank in group["ranks"]}
    return sorted(found)


def _listening_ports(pid: int) -> set[int]:
    """TCP ports that a process listens on (proc(5): state 0A is LISTEN)."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target.startswith("socket:["):
            sockets.add(target[8:-1])
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]]
    return {int(fields[1].rpartition(":")[2], 16) for fields in lines if fields[3] == "0A" and fields[9] in sockets}


async def _command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run, [TENSORWAY, *words], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, **environment},
    )


async def _logged(mesh: Mesh, words: str, names: set[str]) -> None:
    """Returns once the logs of these members hold `words`."""
    async with asyncio.timeout(_SOON_S):
        while not all(words in (mesh.processes.log_dir / f"{name}.log").read_text() for name in names):
            await asyncio.sleep(0.1)

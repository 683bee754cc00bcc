"""A whole mesh with certificates on every hop, its certificates renewed under load, what strangers reach of it, and, at gateways that ask
who calls, what each caller may do."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import subprocess
import sysconfig
import urllib.request
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, suppress
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import yaml

from tensorway import AsyncClient, Tls
from tensorway.cli.certs import Authority
from tensorway.client_operations import ProfileWish
from tensorway.errors import Overloaded, PermissionDenied, TensorwayError, Unauthenticated, Unavailable
from tensorway.registry.port import GROUP, NODE, NODES, ORCHESTRATOR, Registration
from tensorway.tls import GATEWAY, OPERATOR, ROLES, WORKER, MeshTls, TlsFiles
from tensorway.transport import AsyncChannel
from tests.contract.gateway.identities import token
from tests.integration.conftest import Mesh, running_mesh
from tests.integration.identity_doors import CERTIFIED, DEEDS, KEYED, MODEL, OTHER, Doors, doors_of, is_right
from tests.unit.node.supervised import chain

pytestmark = [pytest.mark.asyncio(loop_scope="module")]

TENSORWAY = Path(sysconfig.get_path("scripts")) / "tensorway"
GRPCURL = TENSORWAY.with_name("grpcurl")
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
    # A second model, which sleeps.
    other = chain(folder / "more", "{}").rename(folder / "models" / OTHER)
    document = yaml.safe_load((other / "model.yaml").read_text())
    sleeping = {"name": OTHER, "replicas": 0, "scaling": {"min_replicas": 0, "max_replicas": 1}}
    (other / "model.yaml").write_text(yaml.safe_dump({**document, **sleeping}))
    settings = {"models": f'["{MODEL}","{OTHER}"]', "rank_interface": "lo", "grace_s": 4.0}
    async with running_mesh(folder, MODEL, models_dir=folder / "models", nodes=2, certs=folder / "certs", **settings) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def doors(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Doors]:
    """Begun by the first test that asks who calls: the ones before it count the gateways."""
    async with doors_of(mesh, tmp_path_factory.mktemp("access")) as made:
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
    assert "tensorway --tls-ca FILE" in refused.stderr


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


OPEN, USES = {"health"}, {"infer", "oip", "oip stream", "see", "reflection"}
RUNS = {"see", "scale", "scale other", "topology", "profile", "log level", "reflection"}


@pytest.mark.parametrize(
    ("who", "role", "allowed"),
    [
        ("web", "", USES),
        ("team", "", {"scale other", "reflection"}),
        ("ops", "", RUNS),
        ("jwt:mesh.use", "", USES),
        ("jwt:mesh.run", "", {"see", "scale other", "topology", "reflection"}),
        ("jwt:unheard.of", "", set()),
        ("", OPERATOR, RUNS),
        ("web", OPERATOR, USES),  # a key says more than a certificate
    ],
)  # fmt: skip
async def test_each_caller_may_do_what_the_file_says_and_no_more(doors: Doors, who: str, role: str, allowed: set[str]) -> None:
    credential = token(scope=who[4:]) if who.startswith("jwt:") else doors.access.keys.get(who, "")
    became = {deed: await doors.done(deed, credential, role) for deed in DEEDS}
    assert became == {deed: "OK" if deed in allowed | OPEN else "PERMISSION_DENIED" for deed in DEEDS}


@pytest.mark.parametrize(("credential", "role"), [("", ""), ("", WORKER), ("twk_no", ""), ("twk_no", OPERATOR), ("a.b.c", "")])
async def test_who_proves_nothing_may_only_ask_whether_it_lives(doors: Doors, credential: str, role: str) -> None:
    became = {deed: await doors.done(deed, credential, role) for deed in DEEDS}
    assert became == {deed: "OK" if deed in OPEN else "UNAUTHENTICATED" for deed in DEEDS}


async def test_what_was_managed_and_refused_is_written_down(doors: Doors) -> None:
    """Of the tests before, at each of the gateways what was done there."""
    await doors.written(
        KEYED, ("key:ops", "ScaleModel", MODEL, "allowed"), ("key:ops", "ScaleModel", OTHER, "allowed"),
        ("key:ops", "SetMemberLogLevel", "", "allowed"), ("key:team", "ScaleModel", OTHER, "allowed"),
        ("key:team", "ScaleModel", MODEL, "refused"), ("key:web", "ScaleModel", MODEL, "refused"),
        ("jwt:corp:alice", "ScaleModel", OTHER, "allowed"), ("jwt:corp:alice", "SetMemberLogLevel", "", "refused"),
        ("anonymous", "ScaleModel", "", "missing"), ("anonymous", "GetTopology", "", "malformed"),
    )  # fmt: skip
    await doors.written(
        CERTIFIED, ("certificate:operator.tensorway.internal", "ScaleModel", MODEL, "allowed"),
        ("key:web", "ScaleModel", MODEL, "refused"), ("anonymous", "ScaleModel", "", "missing"),
    )  # fmt: skip
    # What only reads is no one's business.
    assert not [line for line in doors.audit(KEYED) if line["method"].endswith(("/GetTopology", "/Infer")) and line["outcome"] == "allowed"]
    assert not [key for key in doors.access.keys.values() if key in json.dumps(doors.audit(KEYED))]


async def test_log_levels_reach_gateways_that_ask_who_calls(doors: Doors) -> None:
    async with doors.client("ops") as client, doors.client("web") as caller:
        changes = await client.set_log_level("debug")
        await caller.infer(MODEL, {"x": np.ones((1, 2), np.float32)}, request_id="whose")
        await client.set_log_level("info")
    lines = [json.loads(line) for line in (doors.mesh.processes.log_dir / f"{KEYED}.log").read_text().splitlines() if '"whose"' in line]
    assert [(line["message"], line["principal"]) for line in lines] == [("request answered", "key:web")]
    assert {KEYED, CERTIFIED, "gateway-1", "orchestrator-1", "node-1", "node-2"} <= {change.id for change in changes}
    assert {change.error for change in changes} == {""}


async def test_a_profile_is_recorded_for_who_manages_the_model(doors: Doors) -> None:
    sent = np.ones((1, 2), np.float32)
    async with doors.client("web") as caller, doors.operator() as operator, asyncio.timeout(60):
        content = b""
        async with aclosing(operator.profile(ProfileWish(MODEL, num_steps=1))) as replies:
            async for reply in replies:
                if isinstance(reply, bytes):
                    content += reply
                else:
                    assert is_right(sent, (await caller.infer(MODEL, {"x": sent}))["x"])
    assert content.startswith(b"\x1f\x8b")


async def test_the_client_waits_for_as_long_as_a_quota_says(doors: Doors) -> None:
    sent = np.ones((1, 2), np.float32)
    before = await _refusals(doors.mesh)
    async with doors.client("slow", retries=20) as client, asyncio.timeout(60):
        # Five a second and no burst: all at once, they are answered one after another, without a failure.
        async with asyncio.TaskGroup() as tasks:
            answers = [tasks.create_task(client.infer(MODEL, {"x": sent})) for _ in range(4)]
        assert all(is_right(sent, answer.result()["x"]) for answer in answers)
    assert await _refusals(doors.mesh) >= before + 3
    async with doors.client("slow", retries=0) as client:
        with pytest.raises(Overloaded, match=r"key:slow has used its 5 requests a second") as raised:
            await asyncio.gather(*(client.infer(MODEL, {"x": sent}) for _ in range(3)))
    assert 0.0 < raised.value.retry_after_s <= 0.2


async def test_a_key_that_is_revoked_while_calls_run_ends_those_of_its_caller_alone(doors: Doors) -> None:
    sent = np.ones((1, 2), np.float32)
    has_begun, is_over = asyncio.Event(), asyncio.Event()

    async def until_refused() -> None:
        try:
            async with doors.client("leaving", retries=0) as client:
                while True:
                    assert is_right(sent, (await client.infer(MODEL, {"x": sent}))["x"])
                    has_begun.set()
        except Unauthenticated as error:
            assert "revoked" in error.message
        finally:
            is_over.set()

    async def undisturbed() -> None:
        async with doors.client("web", retries=0) as client:
            while not is_over.is_set():
                assert is_right(sent, (await client.infer(MODEL, {"x": sent}))["x"])

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        tasks.create_task(until_refused())
        tasks.create_task(undisturbed())
        await has_begun.wait()
        revoked = await _command("keys", "revoke", "leaving", "--file", str(doors.access.path))
        assert revoked.returncode == 0, revoked.stderr
    assert await doors.done("infer", doors.access.keys["leaving"]) == "UNAUTHENTICATED"


async def test_tools_say_who_calls(doors: Doors) -> None:
    """The command line with a key's file, and grpcurl with a header."""
    assert doors.mesh.certs is not None
    ca, endpoint = str(doors.mesh.certs / "ca.pem"), doors.endpoints[KEYED]

    def tensorway(name: str, *words: str) -> Awaitable[subprocess.CompletedProcess[str]]:
        return _command("--tls-ca", ca, "--api-key-file", str(doors.key_file(name)), *words, "--endpoint", endpoint)

    seen = ("-cacert", ca, "-expand-headers", "-H", "authorization: Bearer ${KEY}", endpoint, "list")
    listed, scaled, refused, described, unknown = await asyncio.gather(
        tensorway("web", "models", "list"), tensorway("team", "models", "scale", OTHER, "0"),
        tensorway("team", "models", "scale", MODEL, "0"),
        _command(*seen, command=GRPCURL, KEY=doors.access.keys["web"]), _command(*seen, command=GRPCURL, KEY="twk_no"),
    )
    assert listed.returncode == 0, listed.stderr
    assert MODEL in listed.stdout
    assert OTHER not in listed.stdout
    assert scaled.returncode == 0, scaled.stderr
    assert refused.returncode == 1
    assert "key:team may not manage model 'chain'" in " ".join(refused.stderr.split())
    assert "tensorway.v1.InferenceService" in described.stdout, described.stderr
    assert unknown.returncode != 0
    async with doors.client("team") as client:
        with pytest.raises(PermissionDenied, match="key:team may not infer model 'chain'; it may: infer:other, manage:other"):
            await client.infer(MODEL, {"x": np.ones((1, 2), np.float32)})


async def _refusals(mesh: Mesh) -> float:
    """Requests that the first of the gateways that ask who calls has refused for more than their quota's rate."""
    (ops,) = [member.metadata["ops"] for member in await mesh.members(GATEWAY) if member.id == KEYED]
    with await asyncio.to_thread(urllib.request.urlopen, f"http://{ops}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    name = 'tensorway_gateway_quota_refusals_total{limit="requests_per_s"}'
    return sum(float(line.split()[1]) for line in lines if line.startswith(name))


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
            with suppress(Unavailable):  # refused before it was written: reading says why
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


async def _command(*words: str, command: Path = TENSORWAY, **environment: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run, [command, *words], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, **environment},
    )


async def _logged(mesh: Mesh, words: str, names: set[str]) -> None:
    """Returns once the logs of these members hold `words`."""
    async with asyncio.timeout(_SOON_S):
        while not all(words in (mesh.processes.log_dir / f"{name}.log").read_text() for name in names):
            await asyncio.sleep(0.1)

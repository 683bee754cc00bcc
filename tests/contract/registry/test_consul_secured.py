"""Consul as it is run in earnest: nothing allowed without a token, TLS with client certificates; and names that others use."""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path

import pytest

from tensorway.cli.certs import Authority
from tensorway.errors import FailedPrecondition, PermissionDenied, Unavailable
from tensorway.registry import open_registry
from tensorway.registry.port import GATEWAY, GROUP, NODE, ORCHESTRATOR, Registration
from tensorway.tls import OPEN_TO_MEMBERS, MeshTls, TlsFiles
from tensorway.transport import HealthService, create_server
from tensorway.transport.port import ServerOptions
from tests.consul.agent import Agent, Certificates, dev_agent
from tests.consul.binary import bring_consul
from tests.contract.registry.conftest import ground_of
from tests.contract.registry.owner import running_owner
from tests.contract.registry.views import PATIENCE_S, seeing, together, until

SHIPPED = Path(__file__).parents[3] / "deploy" / "consul"
POLICY = (SHIPPED / "policy.hcl").read_text()
ROOT_TOKEN = "b1gs3cr3-0000-4000-8000-000000000001"
ACL = {"acl": {"enabled": True, "default_policy": "deny", "tokens": {"master": ROOT_TOKEN, "agent": ROOT_TOKEN}}}


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Agent]:
    """An agent that denies what no token allows."""
    async with dev_agent(tmp_path / "guarded", token=ROOT_TOKEN, **ACL) as agent:
        async with asyncio.timeout(PATIENCE_S):
            while await agent.call("GET", "/v1/acl/policies") == []:
                await asyncio.sleep(0.05)
        await agent.call("PUT", "/v1/acl/policy", {"Name": "tensorway", "Rules": POLICY})
        yield agent


async def new_token(agent: Agent, file: Path) -> str:
    """A token with the policy of deploy/consul alone, put into `file`; returns its accessor."""
    made = await agent.call("PUT", "/v1/acl/token", {"Policies": [{"Name": "tensorway"}]})
    fresh = file.with_suffix(".fresh")
    fresh.write_text(made["SecretID"] + "\n")
    fresh.rename(file)
    return str(made["AccessorID"])


async def test_the_policy_that_we_ship_allows_everything_and_no_more(guarded: Agent, tmp_path: Path) -> None:
    await new_token(guarded, tmp_path / "token")
    url = guarded.registry_url("tensorway", token_file=tmp_path / "token")
    async with running_owner(url) as owner, open_registry(url) as registry:  # type: ignore[attr-defined]
        assert await until(registry.watch(GROUP), bool) == (owner.registration,)
        assert await registry.claim("k", "me") is not None
        await registry.write("k", b"v")
        assert await until(registry.watch_documents(""), bool) == {"k": b"v"}
        await owner.kill()
        assert await until(registry.watch(GROUP), lambda rows: not rows) == ()
        async with open_registry(guarded.registry_url("other", token_file=tmp_path / "token")) as other:  # type: ignore[attr-defined]
            with pytest.raises(PermissionDenied, match=r"denies it to the token in .*/token"):
                await other.write("k", b"v")
    async with open_registry(guarded.registry_url("tensorway")) as nobody:  # type: ignore[attr-defined]
        with pytest.raises(PermissionDenied, match=r"no token .set token_file"):
            await nobody.read("k")


async def _a_token_is_replaced_while_everything_runs(guarded: Agent, tmp_path: Path) -> None:
    file = tmp_path / "token"
    old = await new_token(guarded, file)
    url = guarded.registry_url("tensorway", token_file=file)
    async with (
        running_owner(url) as owner, open_registry(url) as watcher, seeing(watcher.watch(GROUP)) as members,  # type: ignore[attr-defined]
    ):
        await new_token(guarded, file)
        await guarded.call("DELETE", f"/v1/acl/token/{old}")
        await watcher.write("k", b"v")
        await asyncio.sleep(3)
        assert members.views == [(owner.registration,)]
        # Consul keeps a service in step with the token that it was registered with: were it the old one, a death would stay unseen.
        await owner.kill()
        await members.until(lambda rows: rows == ())


async def _an_unknown_token_is_named(guarded: Agent, tmp_path: Path) -> None:
    (tmp_path / "unknown").write_text("00000000-0000-4000-8000-000000000000")
    async with open_registry(guarded.registry_url(token_file=tmp_path / "unknown")) as registry:  # type: ignore[attr-defined]
        with pytest.raises(Unavailable, match=r"does not know the token in .*/unknown"):
            await registry.read("k")
    async with open_registry(guarded.registry_url(token_file=tmp_path / "nowhere")) as registry:  # type: ignore[attr-defined]
        with pytest.raises(FailedPrecondition, match=r"token_file .*nowhere cannot be read"):
            await registry.read("k")


async def test_tokens_that_are_replaced_or_unknown(guarded: Agent, tmp_path: Path) -> None:
    await together(_a_token_is_replaced_while_everything_runs(guarded, tmp_path), _an_unknown_token_is_named(guarded, tmp_path))


def make_certificates(folder: Path) -> tuple[Certificates, Certificates]:
    """Those of a server, and of a client."""
    consul = str(bring_consul())
    steps = (("ca", "create"), ("cert", "create", "-server", "-additional-ipaddress", "127.0.0.1"), ("cert", "create", "-client"))
    for step in steps:
        subprocess.run([consul, "tls", *step], cwd=folder, check=True, capture_output=True)
    ca = folder / "consul-agent-ca.pem"
    server, client = (folder / f"dc1-{kind}-consul-0" for kind in ("server", "client"))
    return tuple(Certificates(ca, name.with_suffix(".pem"), Path(f"{name}-key.pem")) for name in (server, client))  # type: ignore[return-value]


async def test_tls_with_client_certificates(tmp_path: Path) -> None:
    server, client = await asyncio.to_thread(make_certificates, tmp_path)
    async with dev_agent(tmp_path / "agent", certificates=server) as agent:
        options = {"scheme": "https", "ca_file": client.ca, "cert_file": client.certificate, "key_file": client.key}
        async with open_registry(agent.registry_url(check="ttl", **options)) as registry:  # type: ignore[attr-defined]
            await registry.register(Registration(NODE, "n", "a:1"))
            assert len(await until(registry.watch(NODE), bool)) == 1
        for missing in (("ca_file",), ("cert_file", "key_file")):
            fewer = {name: value for name, value in options.items() if name not in missing}
            async with open_registry(agent.registry_url(**fewer)) as stranger:  # type: ignore[attr-defined]
                with pytest.raises(FailedPrecondition, match=r"TLS with the Consul agent at .* fails"):
                    await stranger.read("k")


async def test_an_agent_with_a_certificate_asks_members_that_want_one(tmp_path: Path, stack: AsyncExitStack) -> None:
    """The readiness of a server that takes no caller without a certificate; the agent shows its own, which has no role in the mesh."""
    authority = Authority.open_or_make(tmp_path)
    for role, name in ((ORCHESTRATOR, ORCHESTRATOR), ("consul", "agent")):
        authority.issue(role, ("127.0.0.1",), timedelta(hours=1), name=name)
    own = TlsFiles(cert=str(tmp_path / "orchestrator.pem"), key=str(tmp_path / "orchestrator.key"), ca=str(tmp_path / "ca.pem"))
    server = create_server(ServerOptions("127.0.0.1:0", tls=MeshTls(own).serve(OPEN_TO_MEMBERS)))
    health = HealthService(("",))
    health.attach(server)
    endpoint = await server.start()
    stack.push_async_callback(server.stop, 0.0)
    health.set("", True)
    files = {"ca_file": tmp_path / "ca.pem", "cert_file": tmp_path / "agent.pem", "key_file": tmp_path / "agent.key"}
    with_certificate = {key: str(path) for key, path in files.items()} | {"enable_agent_tls_for_checks": True}
    for settings, status in ((with_certificate, "passing"), ({}, "critical")):
        async with dev_agent(tmp_path / status, **settings) as agent, open_registry(agent.registry_url()) as registry:  # type: ignore[attr-defined,arg-type]
            await registry.register(Registration(ORCHESTRATOR, "o", endpoint, {"tls": "mutual"}))
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    checks = await agent.call("GET", "/v1/agent/checks")
                    (found,) = [check for id_, check in checks.items() if id_.endswith(":readiness")]
                    if found["Status"] == status and found["Output"]:
                        break
                    await asyncio.sleep(0.1)


@pytest.mark.parametrize("name", ["server.hcl", "client.hcl"])
async def test_consul_accepts_the_configuration_that_we_ship(name: str) -> None:
    checking = await asyncio.create_subprocess_exec(str(bring_consul()), "validate", str(SHIPPED / name), stdout=PIPE, stderr=STDOUT)
    output, _ = await checking.communicate()
    assert checking.returncode == 0, output.decode()


async def test_two_meshes_in_one_consul_do_not_meet(shared_agent: Agent, stack: AsyncExitStack) -> None:
    one, other = await ground_of(shared_agent, stack).open(), await ground_of(shared_agent, stack).open()
    await one.register(Registration(NODE, "n", "a:1"))
    await other.register(Registration(NODE, "n", "a:2"))
    assert [row.endpoint for row in await one.registrations(NODE)] == ["a:1"]
    assert [row.endpoint for row in await other.registrations(NODE)] == ["a:2"]
    assert await one.claim("k", "me") is not None
    assert await other.claim("k", "me") is not None
    await one.write("k", b"one")
    assert await other.read("k") is None
    assert await other.create("k", b"other")
    assert await until(one.watch_documents(""), bool) == {"k": b"one"}


async def test_others_find_what_is_ready_by_dns_and_tags(shared_agent: Agent, stack: AsyncExitStack) -> None:
    ground = ground_of(shared_agent, stack)
    prefix = ground.url.rpartition("/")[2]
    registry = open_registry(ground.url)
    stack.push_async_callback(registry.close)
    server, health = create_server(ServerOptions("127.0.0.1:0")), HealthService([""])
    health.attach(server)
    endpoint = await server.start()
    stack.push_async_callback(server.stop, 0.0)
    stack.callback(health.shutdown)
    metadata = {"model": "minilm 2", "zone": "rack-1", "ops": "127.0.0.1:8002"}
    await registry.register(Registration(ORCHESTRATOR, "o-1", endpoint, metadata))
    await registry.register(Registration(GATEWAY, "g", "unix:/run/gateway.sock"))
    # It lives, and is not ready: a member of the mesh, which DNS does not show.
    assert [row.endpoint for row in await until(registry.watch(ORCHESTRATOR), bool)] == [endpoint]
    names = [f"{prefix}-orchestrator.service.consul", *(f"{tag}.{prefix}-orchestrator.service.consul" for tag in ("grpc", "zone-rack-1"))]
    assert await asyncio.to_thread(srv_ports, shared_agent.dns, names[0]) == []
    health.set("", True)
    async with asyncio.timeout(PATIENCE_S):
        while not await asyncio.to_thread(srv_ports, shared_agent.dns, names[0]):
            await asyncio.sleep(0.1)
    for name in names:
        assert await asyncio.to_thread(srv_ports, shared_agent.dns, name) == [int(endpoint.rpartition(":")[2])], name
    assert await asyncio.to_thread(srv_ports, shared_agent.dns, f"zone-rack-2.{prefix}-orchestrator.service.consul") == []
    (entry,) = await shared_agent.call("GET", f"/v1/health/service/{prefix}-orchestrator?passing")
    assert entry["Service"]["Tags"] == ["grpc", "model-minilm-2", "zone-rack-1", "ops=127.0.0.1:8002"]
    assert {key: entry["Service"]["Meta"][key] for key in metadata} == metadata


def srv_ports(server: tuple[str, int], name: str) -> list[int]:
    """The ports of a name's SRV records, asked of a DNS server over UDP (RFC 1035, RFC 2782)."""
    def labels(text: str) -> bytes:
        return b"".join(bytes([len(label)]) + label.encode() for label in text.split(".")) + b"\0"

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(5)
        asking.sendto(struct.pack(">6H", 7, 0x0100, 1, 0, 0, 0) + labels(name) + struct.pack(">2H", 33, 1), server)
        answer = asking.recv(4096)
    _, _, num_questions, num_answers, _, _ = struct.unpack_from(">6H", answer)
    place = 12 + num_questions * (len(labels(name)) + 4)
    ports = []
    for _ in range(num_answers):
        while answer[place] and answer[place] < 0xC0:  # a name ends with an empty label or a pointer
            place += 1 + answer[place]
        place += 2 if answer[place] else 1
        kind, _, _, length = struct.unpack_from(">2HIH", answer, place)
        place += 10
        if kind == 33:
            ports.append(struct.unpack_from(">3H", answer, place)[2])
        place += length
    return ports

"""A real gateway process with an access file: nothing that comes in secretly gets out, and what the lifecycle adds is guarded too."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from tensorway.access.api_keys import new_key
from tensorway.client import AsyncClient, Client
from tensorway.compat import grpc_service_pb2
from tensorway.errors import PermissionDenied, Unauthenticated
from tensorway.tls import Tls
from tensorway.v1 import inference_pb2, link_pb2, mesh_pb2, model_pb2, node_pb2, ops_pb2
from tensorway_gateway.identity.methods import RULES, Scope
from tests.contract.gateway.identities import FORGER, AccessFile, call, issuer_rule, token, write_key_set


@dataclass(slots=True)
class Gateway:
    """The process, and where it writes."""

    process: subprocess.Popen[bytes]
    log: Path
    audit: Path
    endpoint: str
    access: AccessFile


def start(folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    words = ["--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0", "--registry", f"directory:{folder / 'registry'}", *flags]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "tensorway_gateway", *words], stderr=log, stdout=log, cwd=folder)


def bound(folder: Path, process: subprocess.Popen[bytes]) -> str:
    """The endpoint, once it stands in the log."""
    ends_s = time.monotonic() + 60
    while time.monotonic() < ends_s and process.poll() is None:
        for line in (folder / "log").read_text().splitlines():
            if '"serving"' in line:
                return str(json.loads(line)["endpoint"])
        # There is no event for another process's log.
        signal.sigtimedwait([], 0.05)
    raise AssertionError((folder / "log").read_text())


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("process")
    access = AccessFile(folder)
    access.add("web", "infer:echo")
    access.add("ops", "observe", "manage")
    access.add("old", "infer", not_after="2020-01-01T00:00:00Z")
    write_key_set(folder / "jwks.json")
    access.write(issuers=[issuer_rule()])
    flags = ("--access-file", "access.yaml", "--audit-file", "audit.jsonl", "--log-level", "debug", "--log-format", "json")
    process = start(folder, *flags)
    try:
        yield Gateway(process, folder / "log", folder / "audit.jsonl", bound(folder, process), access)
    finally:
        process.kill()
        process.wait()


async def test_no_credential_gets_into_any_log(gateway: Gateway) -> None:
    keys = gateway.access.keys
    false = {
        "cut": keys["web"][:-2], "unknown": new_key(), "expired": keys["old"], "forged": token(FORGER), "late": token(exp=1),
        "genuine": token(),
        "good": keys["web"], "password": "hunter2-hunter2-hunter2", "dots": "aaaaaaaaaaaa.bbbbbbbbbbbb.cccccccccccc",
    }
    async with grpc.aio.insecure_channel(gateway.endpoint) as channel:
        for name, credential in false.items():
            for metadata in ((("authorization", f"Bearer {credential}"),), (("x-api-key", credential),), (("authorization", credential),)):
                for method in ("/tensorway.v1.InferenceService/Infer", "/tensorway.v1.ModelService/ScaleModel"):
                    status, _, sentence = await call(channel, method, b"", metadata=metadata)
                    assert status in ("UNAUTHENTICATED", "PERMISSION_DENIED"), (name, status, sentence)
                    assert credential not in sentence
    ends_s = time.monotonic() + 20
    while time.monotonic() < ends_s and len(gateway.audit.read_text().splitlines() if gateway.audit.exists() else ()) < 40:
        await asyncio.sleep(0.02)
    written = gateway.log.read_text() + gateway.audit.read_text()
    assert gateway.audit.read_text().count("authenticate") >= 40
    for name, credential in false.items():
        for part in [credential, *(piece for piece in credential.split(".") if len(piece) > 10)]:
            assert part not in written, name


async def test_what_the_lifecycle_adds_is_guarded_too(gateway: Gateway) -> None:
    keys = gateway.access.keys
    reflection, level = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "/tensorway.v1.OpsService/SetLogLevel"
    async with grpc.aio.insecure_channel(gateway.endpoint) as channel:
        assert (await call(channel, reflection, b"\x3a\x00"))[0] == "UNAUTHENTICATED"
        assert (await call(channel, reflection, b"\x3a\x00", keys["web"]))[0] == "OK"
        assert (await call(channel, level, b"", keys["web"]))[0] == "PERMISSION_DENIED"
        assert (await call(channel, level, b""))[0] == "UNAUTHENTICATED"
        assert (await call(channel, level, b"", keys["ops"]))[0] not in ("UNAUTHENTICATED", "PERMISSION_DENIED")
        assert (await call(channel, "/grpc.health.v1.Health/Check", b""))[0] == "OK"


async def test_no_method_of_any_contract_is_open_by_accident(gateway: Gateway) -> None:
    """What the gateway serves of all services that there are, and whatever it may serve once."""
    files = (inference_pb2, model_pb2, mesh_pb2, ops_pb2, node_pb2, link_pb2, grpc_service_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    methods = [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]
    assert len(methods) > 30
    is_ours = ("NodeService", "LinkService")
    async with grpc.aio.insecure_channel(gateway.endpoint) as channel:
        for method in methods:
            status, _, _ = await call(channel, method, b"")
            if method in RULES and RULES[method].scope is Scope.OPEN:
                assert status == "OK", method
            else:
                assert status in ("UNAUTHENTICATED", "UNIMPLEMENTED"), (method, status)
            assert method in RULES or any(name in method for name in is_ours), f"{method} has no rule"


async def test_a_certificate_is_a_credential(tmp_path: Path) -> None:
    """Client certificates of an authority that the gateway was told of: one is known by its name, another proves nothing here."""
    program = "from tensorway.cli.app import main; main()"
    subprocess.run(
        [sys.executable, "-c", program, "certs", "create", "certs", "--role", "gateway", "--role", "worker", "--role", "operator"],
        cwd=tmp_path, check=True, capture_output=True, timeout=60,
    )
    certs = tmp_path / "certs"
    access = AccessFile(tmp_path)
    key = access.add("web", "infer:echo")
    access.write(certificates=[{"name": name_of(certs / "operator.pem"), "allow": ["observe"]}])
    flags = ("--public-cert", "certs/gateway.pem", "--public-key", "certs/gateway.key", "--client-ca", "certs/ca.pem")
    process = start(tmp_path, "--access-file", "access.yaml", "--log-format", "json", *flags)
    try:
        endpoint = bound(tmp_path, process).replace("127.0.0.1", "localhost")

        def client(role: str, **credential: str) -> Client:
            tls = Tls(ca=str(certs / "ca.pem"), cert=str(certs / f"{role}.pem"), key=str(certs / f"{role}.key"))
            return Client(endpoint, tls=tls, **credential)  # type: ignore[arg-type]

        with client("operator") as known:
            assert [member.kind for member in known.topology()] == ["gateway"]
        with client("worker") as unknown, pytest.raises(Unauthenticated, match="no credential was sent"):
            unknown.topology()
        # A key says more than a certificate, and a false key is not made good by one.
        with client("operator", api_key=key) as keyed, pytest.raises(PermissionDenied, match="key:web"):
            keyed.topology()
        with client("operator", api_key=new_key()) as false, pytest.raises(Unauthenticated):
            false.topology()
    finally:
        process.kill()
        process.wait()


def name_of(path: Path) -> str:
    """The first DNS name of a certificate."""
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.DNSName)[0]


async def test_the_clients_send_their_credentials(gateway: Gateway) -> None:
    keys = gateway.access.keys
    with Client(gateway.endpoint) as client, pytest.raises(Unauthenticated, match="no credential was sent"):
        client.models()
    with Client(gateway.endpoint, api_key=keys["web"]) as client:
        assert client.models() == ()
        with pytest.raises(PermissionDenied, match="key:web may not observe the mesh as a whole"):
            client.topology()
    tokens = iter([token(FORGER), token()])
    async with AsyncClient(gateway.endpoint, token=lambda: next(tokens)) as aclient:
        with pytest.raises(Unauthenticated, match="signature"):
            await aclient.models()
        assert await aclient.models() == ()
    words = [sys.executable, "-c", "from tensorway.cli.app import main; main()", "models", "--endpoint", gateway.endpoint]
    for environment, status in (({}, 1), ({"TENSORWAY_API_KEY": keys["web"]}, 0)):
        ran = await asyncio.to_thread(
            subprocess.run, words, env={"PATH": "/usr/bin", "HOME": "/tmp", **environment}, capture_output=True, text=True, timeout=60
        )
        assert ran.returncode == status, ran.stderr
        assert keys["web"] not in ran.stdout + ran.stderr


def test_a_bad_access_file_is_told_whole_and_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "access.yaml").write_text("keys: [{name: x, hashes: [twk_mistake]}, {name: y}]\nrulez: {}")
    process = start(tmp_path, "--access-file", "access.yaml")
    try:
        assert process.wait(60) == 2
    finally:
        process.kill()
    said = (tmp_path / "log").read_text()
    assert all(fault in said for fault in ("keys[0].hashes[0].hash", "keys[1].hashes", "rulez", "--access-file"))
    assert "twk_mistake" not in said

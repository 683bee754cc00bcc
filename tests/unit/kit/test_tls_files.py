"""Certificates on disk: what is refused, and the ops port's own use of them."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import aiohttp
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

import tensorway.tls
from tensorway.cli.certs import Authority
from tensorway.errors import FailedPrecondition
from tensorway.telemetry.ops import OpsServer
from tensorway.telemetry.ops_tls import CertificateCollector, ops_context
from tensorway.tls import GATEWAY, OPERATOR, WORKER, MeshTls, TlsFiles, open_mesh_tls

DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    authority = Authority.open_or_make(folder)
    for role in (WORKER, OPERATOR):
        authority.issue(role, ("127.0.0.1",), DAY)
    (folder / "text.pem").write_text("no certificate")
    return folder


def files(folder: Path, cert: str = "worker.pem", key: str = "worker.key", ca: str = "ca.pem") -> TlsFiles:
    return TlsFiles(cert=str(folder / cert), key=str(folder / key), ca=str(folder / ca))


@pytest.mark.parametrize(
    ("given", "field", "why"),
    [
        ({"cert": "absent.pem"}, "tls_cert", "cannot be read"), ({"ca": "absent.pem"}, "tls_ca", "cannot be read"),
        ({"cert": "text.pem"}, "tls_cert", "no certificate in PEM form"), ({"key": "text.pem"}, "tls_key", "no private key in PEM form"),
        ({"ca": "text.pem"}, "tls_ca", "no certificates in PEM form"),
        ({"key": "operator.key"}, "tls_key", "not the key of the certificate"),
    ],
)
def test_files_that_do_not_serve_are_named(folder: Path, given: dict[str, str], field: str, why: str) -> None:
    with pytest.raises(FailedPrecondition, match=why) as caught:
        files(folder, **given)
    assert caught.value.field == field


def test_part_of_a_mesh_s_tls_is_refused(folder: Path) -> None:
    assert open_mesh_tls("", "", "", "x") is None
    with pytest.raises(FailedPrecondition, match="tls_key is not set"):
        open_mesh_tls(str(folder / "worker.pem"), "", str(folder / "ca.pem"), "x")
    with pytest.raises(FailedPrecondition, match="go together"):
        TlsFiles(cert=str(folder / "worker.pem"))


def test_only_its_owner_reads_a_key(folder: Path) -> None:
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*.key")} == {0o600}
    assert not list(folder.glob(".*"))


def test_another_command_s_authority_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("mine")
    with pytest.raises(FailedPrecondition, match="cannot be read"):
        Authority.open_or_make(tmp_path)
    assert (tmp_path / "ca.pem").read_text() == "mine"
    before = (folder / "ca.pem").read_bytes()
    Authority.open_or_make(folder).issue(GATEWAY, ("example.com",), DAY)
    assert (folder / "ca.pem").read_bytes() == before


async def test_the_ops_port_takes_only_known_callers_and_follows_its_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorway.tls, "_LOOK_S", 0.0)
    for name in ("worker.pem", "worker.key", "ca.pem"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    own = MeshTls(files(tmp_path))
    metrics = CollectorRegistry()
    CertificateCollector(own.files, metrics)
    server = OpsServer("127.0.0.1:0", lambda: None, metrics, ops_context("mtls", own))
    await server.start()
    try:
        known = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        known.load_cert_chain(folder / "operator.pem", folder / "operator.key")
        stranger = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        assert b"expiry_timestamp" in await _get(server.endpoint, known)
        with pytest.raises(aiohttp.ClientError):
            await _get(server.endpoint, stranger)
        expiry = own.files.material().expires_s
        Authority.open_or_make(tmp_path / "new").issue(WORKER, ("127.0.0.1",), 2 * DAY)
        for name in ("worker.pem", "worker.key", "ca.pem"):
            (tmp_path / name).write_bytes((tmp_path / "new" / name).read_bytes())
        with pytest.raises(aiohttp.ClientError):
            await _get(server.endpoint, known)
        assert own.files.material().expires_s > expiry
        (shown,) = [line for line in generate_latest(metrics).decode().splitlines() if line.startswith("tensorway_tls_certificate")]
        assert float(shown.split()[1]) == own.files.material().expires_s
    finally:
        await server.stop()


def test_an_ops_port_without_a_certificate_is_refused() -> None:
    assert ops_context("off", None) is None
    with pytest.raises(FailedPrecondition, match="set tls_cert, tls_key and tls_ca"):
        ops_context("tls", None)


async def _get(endpoint: str, context: ssl.SSLContext) -> bytes:
    async with aiohttp.ClientSession() as session, session.get(f"https://{endpoint}/metrics", ssl=context) as response:
        return await response.read()

"""The sidecar pair: SPIFFE identities checked on both sides, and who may call what."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from tensorway import AsyncClient
from tensorway.errors import PermissionDenied, Unavailable
from tests.deploy.certificates import Authority
from tests.deploy.envoy import Envoy, rendered, running_envoy, shipped
from tests.deploy.fleet import Fleet

pytestmark = pytest.mark.asyncio(loop_scope="session")

DOMAIN = "spiffe://tensorway.internal/ns/default/sa"
X = {"x": np.ones((1, 4), np.float32)}


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.made()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(fleet: Fleet, authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Envoy]:
    """sidecar-server.yaml beside gateway-1."""
    folder = tmp_path_factory.mktemp("server")
    endpoint = (await fleet.endpoints()).partition(",")[0]
    tls = authority.write(folder / "tls", "tls", f"{DOMAIN}/gateway")
    async with running_envoy(rendered(folder, "sidecar-server.yaml", {"gateway": endpoint}, tls)) as envoy:
        yield envoy


@asynccontextmanager
async def calling_through(folder: Path, server: Envoy, tls: Path) -> AsyncIterator[AsyncClient]:
    """A client beside sidecar-client.yaml, which shows what is in `tls`."""
    async with AsyncExitStack() as stack:
        envoy = await stack.enter_async_context(running_envoy(rendered(folder, "sidecar-client.yaml", {"gateways": server.endpoint}, tls)))
        yield await stack.enter_async_context(AsyncClient(envoy.endpoint, retries=0, timeout_s=10))


async def test_a_client_may_infer_and_no_more(tmp_path: Path, server: Envoy, authority: Authority) -> None:
    tls = authority.write(tmp_path / "tls", "tls", f"{DOMAIN}/client")
    async with calling_through(tmp_path, server, tls) as client:
        assert (await client.infer("echo", X))["y"].tobytes() == X["x"].tobytes()
        with pytest.raises(PermissionDenied):
            await client.scale("echo", 0)
    # Both ends may do no less than TLS 1.2, and do 1.3.
    assert await server.stat("listener.127.0.0.1_0.ssl.versions.TLSv1.3") > 0


async def test_an_operator_may_do_all(tmp_path: Path, server: Envoy, authority: Authority) -> None:
    tls = authority.write(tmp_path / "tls", "tls", f"{DOMAIN}/operator")
    async with calling_through(tmp_path, server, tls) as client:
        assert "echo" in {model.name for model in await client.models()}


async def test_another_of_the_same_authority_may_nothing(tmp_path: Path, server: Envoy, authority: Authority) -> None:
    """Its health check is refused too, which Envoy takes for an unhealthy gateway: it is asked directly."""
    tls = authority.write(tmp_path / "tls", "tls", f"{DOMAIN}/stranger")
    assert await asked_directly(server, tls) == ["403"]


async def test_one_of_another_authority_is_not_even_heard(tmp_path: Path, server: Envoy) -> None:
    tls = Authority.made("elsewhere").write(tmp_path / "tls", "tls", f"{DOMAIN}/client")
    async with calling_through(tmp_path, server, tls) as client:
        with pytest.raises(Unavailable):
            await client.infer("echo", X)


async def test_who_shows_no_certificate_is_not_heard(server: Envoy, authority: Authority, tmp_path: Path) -> None:
    context = ssl.create_default_context(cafile=str(authority.write(tmp_path, "tls", "localhost") / "ca.crt"))
    context.check_hostname = False
    with pytest.raises((ssl.SSLError, ConnectionError)):
        settings_of(server.endpoint, context)


def settings_of(endpoint: str, context: ssl.SSLContext) -> bytes:
    """The first bytes of an HTTP/2 server. In TLS 1.3 it refuses only after the client's side of the handshake is done."""
    host, _, port = endpoint.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as plain, context.wrap_socket(plain) as connection:
        connection.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        if received := connection.recv(1000):
            return received
        raise ConnectionError("closed without a word")


async def test_a_client_talks_to_a_gateway_only(tmp_path: Path, fleet: Fleet, authority: Authority) -> None:
    """A server that is of the authority, but no gateway, is not believed."""
    endpoint = (await fleet.endpoints()).partition(",")[0]
    impostor = authority.write(tmp_path / "impostor-tls", "tls", f"{DOMAIN}/client")
    tls = authority.write(tmp_path / "tls", "tls", f"{DOMAIN}/client")
    config = rendered(tmp_path / "impostor", "sidecar-server.yaml", {"gateway": endpoint}, impostor)
    async with running_envoy(config) as server, calling_through(tmp_path / "client", server, tls) as client:
        with pytest.raises(Unavailable):
            await client.infer("echo", X)


async def test_both_sides_name_the_same_identities() -> None:
    (cluster,) = shipped("sidecar-client.yaml")["static_resources"]["clusters"]
    matchers = cluster["transport_socket"]["typed_config"]["common_tls_context"]["combined_validation_context"]
    names = matchers["default_validation_context"]["match_typed_subject_alt_names"]
    assert names == [{"san_type": "URI", "matcher": {"exact": f"{DOMAIN}/gateway"}}]


async def asked_directly(server: Envoy, tls: Path) -> list[str]:
    """HTTP status lines of one call over mTLS, by curl."""
    command = ["curl", "-sk", "--http2", "--cert", str(tls / "tls.crt"), "--key", str(tls / "tls.key"), "-o", "/dev/null", "-w",
               "%{http_code}", "-X", "POST", f"https://{server.endpoint}/tensorway.v1.InferenceService/Infer"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    return output.decode().split()

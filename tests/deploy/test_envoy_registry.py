"""front-proxy-tls.yaml as it is meant to run: gateways from a real Consul by registry_eds.py, TLS on both sides, certificates renewed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from tensorway.registry import open_registry
from tensorway.registry.port import GATEWAY, Registration
from tests.consul.agent import dev_agent
from tests.deploy.certificates import Authority
from tests.deploy.envoy import SHIPPED, Envoy, rendered, running_envoy
from tests.deploy.fleet import Fleet

pytestmark = pytest.mark.asyncio(loop_scope="session")

DOMAIN = "spiffe://tensorway.internal/ns/default/sa"
PROGRAM = SHIPPED / "registry_eds.py"


@asynccontextmanager
async def following(registry_url: str, output: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """registry_eds.py, once it has written its first list."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROGRAM), "--registry", registry_url, "--output", str(output), stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        line = await asyncio.wait_for(process.stderr.readline(), 30)
        assert b"watching" in line, line + await process.stderr.read()
        yield process
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def asked(envoy: Envoy, ca: Path) -> str:
    """The model that a caller over TLS is told of, by curl, which checks Envoy's certificate."""
    command = ["curl", "-sS", "--fail-with-body", "--http2", "--cacert", str(ca), f"https://{envoy.endpoint}/v1/models/echo"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    output, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, (output, errors, await envoy.ask("/clusters"))
    return str(json.loads(output)["model"]["name"])


async def test_envoy_follows_consul_over_tls(fleet: Fleet, tmp_path: Path) -> None:
    authority = Authority.made()
    mesh = authority.write(tmp_path / "mesh", "tls", f"{DOMAIN}/gateway", "gateway.tensorway.internal")
    front = authority.write(tmp_path / "front-tls", "tls", f"{DOMAIN}/operator")
    authority.write(front, "front", "localhost", "127.0.0.1")
    async with AsyncExitStack() as stack:
        # What answers with mTLS in the gateways' name: an Envoy beside each of them.
        sidecars = [
            await stack.enter_async_context(
                running_envoy(rendered(tmp_path / f"sidecar-{number}", "sidecar-server.yaml", {"gateway": endpoint}, mesh))
            )
            for number, endpoint in enumerate((await fleet.endpoints()).split(","))
        ]
        agent = await stack.enter_async_context(dev_agent(tmp_path / "consul"))
        url = agent.registry_url(check="ttl")
        registry = open_registry(url)
        stack.push_async_callback(registry.close)
        lease = await registry.register(Registration(GATEWAY, "gateway-1", sidecars[0].endpoint))

        folder = tmp_path / "front"
        config = rendered(folder, "front-proxy-tls.yaml", tls=front)
        await stack.enter_async_context(following(url, folder / "gateways.json"))
        envoy = await stack.enter_async_context(running_envoy(config))
        await wait_endpoints(envoy, {sidecars[0].endpoint})
        await envoy.wait_healthy("gateways", 1)
        assert await asked(envoy, front / "ca.crt") == "echo"

        await registry.register(Registration(GATEWAY, "gateway-2", sidecars[1].endpoint))
        await wait_endpoints(envoy, {sidecar.endpoint for sidecar in sidecars})
        await lease.release()
        await wait_endpoints(envoy, {sidecars[1].endpoint})

        await envoy.wait_healthy("gateways", 1)

        # Consul away: what is known stays, and serves.
        await agent.kill()
        await check_renewal(envoy, authority, front)
        assert await asked(envoy, front / "ca.crt") == "echo"


async def wait_endpoints(envoy: Envoy, expected: set[str]) -> None:
    """Returns once these are all that Envoy knows."""
    await envoy.wait_hosts("gateways", lambda hosts: hosts.keys() == expected)


async def check_renewal(envoy: Envoy, authority: Authority, front: Path) -> None:
    """A certificate that is replaced is shown to whoever comes next, without a restart."""
    before = await asyncio.to_thread(shown, envoy)
    renewed = authority.write(front.parent / "renewed", "front", "localhost", "127.0.0.1")
    for name in ("front.key", "front.crt"):
        shutil.copy(renewed / name, front / f".{name}")
        os.replace(front / f".{name}", front / name)
    async with asyncio.timeout(30):
        while await asyncio.to_thread(shown, envoy) == before:
            await asyncio.sleep(0.05)


def shown(envoy: Envoy) -> str:
    host, _, port = envoy.endpoint.rpartition(":")
    return ssl.get_server_certificate((host, int(port)))


async def test_a_wrong_registry_is_told_in_a_line(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROGRAM), "--registry", "nonsense:", "--output", str(tmp_path / "gateways.json"),
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert errors.startswith(b"registry_eds: ")
    assert errors.count(b"\n") == 1

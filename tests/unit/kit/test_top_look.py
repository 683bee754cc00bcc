"""`tensorway top` reads ops ports that ask for certificates, and goes on where one does not answer."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from tensorway.cli.certs import Authority
from tensorway.cli.connection import Connection
from tensorway.cli.top_look import MeshReader, ops_tls, read_samples
from tensorway.client import AsyncClient
from tensorway.registry.port import GATEWAY, ORCHESTRATOR, Registration
from tensorway.telemetry.ops import OpsServer, Page
from tensorway.telemetry.ops_metrics import MemberCollector
from tensorway.telemetry.ops_tls import ops_context
from tensorway.tls import OPERATOR, open_mesh_tls


class _Mesh:
    """What a client tells of a mesh of these members."""

    def __init__(self, *members: Registration) -> None:
        self._members = members

    async def topology(self, **_: Any) -> tuple[Registration, ...]:
        return self._members

    async def load(self, **_: Any) -> tuple[()]:
        return ()


async def ops_server(service: str, tls: Any = None) -> OpsServer:
    async def status() -> Page:
        return Page("application/json", b'{"errors": [{"unix_s": 1.0, "code": "INTERNAL"}]}')

    metrics = CollectorRegistry()
    MemberCollector(service, lambda: True, lambda: 3, metrics)
    server = OpsServer("127.0.0.1:0", lambda: None, metrics, tls, {"/status.json": status})
    await server.start()
    return server


@pytest.mark.asyncio
async def test_certificates_are_shown_to_ops_ports_that_ask_for_them(tmp_path: Path) -> None:
    authority = Authority.open_or_make(tmp_path)
    for role in (GATEWAY, OPERATOR):
        authority.issue(role, ("127.0.0.1",), datetime.timedelta(days=1))

    def file(name: str) -> str:
        return str(tmp_path / name)

    mesh_tls = open_mesh_tls(file("gateway.pem"), file("gateway.key"), file("ca.pem"), "tensorway.internal")
    closed = await ops_server(GATEWAY, ops_context("mtls", mesh_tls))
    plain = await ops_server(ORCHESTRATOR)
    members = (
        Registration(GATEWAY, "g", "h:1", {"ops": closed.endpoint}), Registration(ORCHESTRATOR, "o", "h:2", {"ops": plain.endpoint}),
        Registration(ORCHESTRATOR, "gone", "h:3", {"ops": "127.0.0.1:1"}), Registration(ORCHESTRATOR, "off", "h:4", {}),
    )
    client = cast("AsyncClient", _Mesh(*members))
    try:
        async with aiohttp.ClientSession() as session:
            known = ops_tls(Connection(ca=file("ca.pem"), cert=file("operator.pem"), key=file("operator.key")))
            look = await MeshReader(client, session, known).look()
            assert set(look.samples) == {"g", "o"}
            assert look.samples["g"]["tensorway_grpc_open_calls"] == {(): 3.0}
            assert [error["code"] for error in look.errors] == ["INTERNAL"]
            unknown = ops_tls(Connection(ca=file("ca.pem")))
            assert set((await MeshReader(client, session, unknown).look()).samples) == {"o"}
            assert set((await MeshReader(client, session).look()).samples) == {"o"}
    finally:
        await closed.stop()
        await plain.stop()


def test_only_the_meshs_and_the_processs_samples_are_read() -> None:
    mesh = '# TYPE tensorway_y gauge\ntensorway_y{b="2",a="1"} 3\n'
    samples = read_samples(f"# TYPE x gauge\nx 1\n{mesh}# TYPE process_z gauge\nprocess_z 4\n")
    assert samples == {"tensorway_y": {(("a", "1"), ("b", "2")): 3.0}, "process_z": {(): 4.0}}

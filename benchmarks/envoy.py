"""`python -m benchmarks.envoy`: what the shipped front proxy adds to a request. Writes benchmarks/envoy.md.

The same calls of the identity model (4 KiB) go to the gateway, and through a real Envoy with deploy/envoy/front-proxy.yaml: gRPC by the
Python client, and REST by aiohttp. Each row is the median of three rounds, taken in turn, so that what else the machine does hits all
alike. CPU is that of the Envoy process for each call, its access log included.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import datetime
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
import numpy as np
import yaml

from benchmarks.cpu import CpuClock
from benchmarks.report import machine
from tensorway import AsyncClient
from tensorway.cli.local_mesh import LocalMesh, MemberPlan, flags_of
from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import GATEWAY

ROOT: Final = Path(__file__).parents[1]
INPUT: Final = np.ones((1, 1024), np.float32)
ROUNDS: Final = 3
IN_FLIGHT: Final = (1, 32)
Call = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Row:
    """One way to call, at one number in flight."""

    way: str
    in_flight: int
    p50_ms: float
    p99_ms: float
    requests_per_s: float
    #: CPU µs of Envoy for each call.
    envoy_us: float


async def measure(call: Call, in_flight: int, seconds: float) -> tuple[list[float], float]:
    """Latencies in ms of a closed loop, and the seconds that it took."""
    latencies: list[float] = []
    begun_s = time.perf_counter()

    async def caller() -> None:
        while (sent_s := time.perf_counter()) < begun_s + seconds:
            await call()
            latencies.append((time.perf_counter() - sent_s) * 1000)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(in_flight):
            tasks.create_task(caller())
    return latencies, time.perf_counter() - begun_s


@asynccontextmanager
async def proxy(folder: Path, gateway: str) -> AsyncIterator[tuple[str, int]]:
    """Endpoint and process id of an Envoy before one gateway."""
    config = yaml.safe_load((ROOT / "deploy/envoy/front-proxy.yaml").read_text().replace("/etc/envoy", str(ROOT / "deploy/envoy")))
    host, _, port = gateway.rpartition(":")
    config["admin"]["address"]["socket_address"]["port_value"] = 0
    (listener,) = config["static_resources"]["listeners"]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": 0}
    (cluster,) = config["static_resources"]["clusters"]
    (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    endpoint["endpoint"]["address"]["socket_address"] = {"address": host, "port_value": int(port)}
    path, admin = folder / "front-proxy.yaml", folder / "admin"
    path.write_text(yaml.safe_dump(config))
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).parent / "envoy"), "-c", str(path), "--use-dynamic-base-id", "--concurrency", "1", "--log-level", "error",
        "--admin-address-path", str(admin), stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        yield await _listening(admin), process.pid
    finally:
        process.kill()
        await process.wait()


async def _listening(admin: Path) -> str:
    """The proxy's endpoint, once its gateway is healthy."""
    async with asyncio.timeout(30), aiohttp.ClientSession() as http:
        while not (admin.exists() and admin.read_text()):  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.05)
        root = f"http://{admin.read_text().strip()}"
        while "health_flags::healthy" not in await (await http.get(f"{root}/clusters")).text():  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.05)
        return (await (await http.get(f"{root}/listeners")).text()).strip().partition("::")[2]


async def rows(seconds: float) -> list[Row]:
    """Every way at every number in flight."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shared = {"registry": f"directory:{folder / 'registry'}", "listen": "127.0.0.1:0", "ops_listen": "127.0.0.1:0"}
        node = {**shared, "models_dir": str(ROOT / "models"), "models": '["identity"]'}
        async with LocalMesh(folder / "logs") as mesh, DirectoryRegistry(folder / "registry") as registry:
            plans = {"gateway": shared, "orchestrator": shared, "node": node}
            await mesh.start([MemberPlan(service, service, flags_of(settings)) for service, settings in plans.items()])
            gateway = await _gateway(registry)
            async with (
                proxy(folder, gateway) as (front, pid), AsyncClient(gateway) as direct, AsyncClient(front) as through,
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
            ):
                return await _compare(direct, through, http, front, CpuClock({"envoy": (pid,)}), seconds)


async def _gateway(registry: DirectoryRegistry) -> str:
    """The gateway's endpoint, once identity is served."""
    async for found in registry.watch(GATEWAY):
        if found:
            break
    async with asyncio.timeout(120), AsyncClient(found[0].endpoint) as client:
        while not any(model.is_ready for model in await client.models()):  # noqa: ASYNC110 - the gateway tells when asked
            await asyncio.sleep(0.1)
        await client.infer("identity", {"input": INPUT}, timeout_s=60)
    return found[0].endpoint


async def _compare(
    direct: AsyncClient, through: AsyncClient, http: aiohttp.ClientSession, front: str, clock: CpuClock, seconds: float
) -> list[Row]:
    data = base64.b64encode(INPUT.tobytes()).decode()
    body = {"inputs": [{"name": "input", "dtype": "DATA_TYPE_FP32", "shape": INPUT.shape, "data": data}]}

    async def rest() -> None:
        async with http.post(f"http://{front}/v1/models/identity:infer", json=body) as response:
            response.raise_for_status()
            await response.read()

    ways: dict[str, Call] = {
        "gRPC, gateway": lambda: direct.infer("identity", {"input": INPUT}),
        "gRPC, Envoy": lambda: through.infer("identity", {"input": INPUT}),
        "REST, Envoy": rest,
    }
    taken: dict[tuple[str, int], list[Row]] = {}
    for in_flight in IN_FLIGHT:
        for _ in range(ROUNDS):
            for way, call in ways.items():
                before = clock.read()["envoy"]
                latencies, took_s = await measure(call, in_flight, seconds)
                cpu_us = (clock.read()["envoy"] - before) / 1000 / len(latencies)
                cuts = statistics.quantiles(latencies, n=100)
                row = Row(way, in_flight, cuts[49], cuts[98], len(latencies) / took_s, cpu_us)
                taken.setdefault((way, in_flight), []).append(row)
    return [sorted(found, key=lambda row: row.p50_ms)[len(found) // 2] for found in taken.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what Envoy adds to a request.")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each round")
    found = asyncio.run(rows(parser.parse_args().seconds))
    lines = [
        f"| {row.way} | {row.in_flight} | {row.p50_ms:.2f} | {row.p99_ms:.2f} | {row.requests_per_s:.0f} | "
        f"{'' if row.way.endswith('gateway') else f'{row.envoy_us:.0f}'} |"
        for row in found
    ]
    text = "\n".join([
        "# What the front proxy adds", "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {machine()} Made by `python -m benchmarks.envoy`.", "",
        "identity, 4 KiB each way. The Python caller is the slowest part of the way, and others used the machine too.", "",
        "| way | in flight | p50 ms | p99 ms | requests/s | Envoy CPU µs |", "| --- | ---: | ---: | ---: | ---: | ---: |", *lines, "",
    ])
    (ROOT / "benchmarks" / "envoy.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

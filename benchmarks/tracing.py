"""`python -m benchmarks.tracing`: what tracing costs a request, where it is not sampled and where it is.

First each step that an unsampled request takes through tracing, alone, in all three services. Then four meshes side by side, the same
but for tracing: off, off once more (what differs between these two is chance), on with nothing sampled, and on with everything sampled.
They get the same requests in turns, so that what else the machine does meets all of them; CPU is the services' own.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
import timeit
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp

from benchmarks.cpu import CpuClock
from tensorway import AsyncClient
from tensorway.cli.local_mesh import LocalMesh, MemberPlan, flags_of
from tensorway.registry import open_registry
from tensorway.registry.port import GATEWAY, GROUP, ORCHESTRATOR
from tensorway.telemetry.trace_context import new_trace
from tensorway.telemetry.tracing import TraceSettings, child_of, open_tracer
from tensorway.tls import ROLE_OF_KIND, Tls
from tensorway.transport import create_server
from tensorway.transport.port import Call, ServerOptions
from tensorway.v1 import link_pb2
from tensorway_gateway.request_span import open_span
from tensorway_orchestrator.request_trace import RequestTrace, begun
from tensorway_worker.rank.step_trace import StepTracing

ROOT = Path(__file__).parent.parent
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
KINDS = (GATEWAY, ORCHESTRATOR, GROUP)
#: Setting by name of the mesh; None: tracing is off.
MESHES: dict[str, float | None] = {"off": None, "off, once more": None, "on, none sampled": 0.0, "on, all sampled": 1.0}


def microseconds(work: Callable[[], object], number: int = 200_000) -> float:
    """The best of five."""
    return min(timeit.repeat(work, number=number, repeat=5)) / number * 1e6


class _Unsampled:
    """A queued request, as far as `begun` looks at it."""

    trace = None


@dataclass
class _Called:
    """An RPC, as far as its span looks at it; core has the method as bytes."""

    metadata: dict[str, str | bytes]

    @property
    def method(self) -> str:
        return b"/tensorway.v1.InferenceService/Infer".decode("utf-8", "replace")


def parts(endpoint: str) -> list[tuple[str, float]]:
    """What an unsampled request costs in each service, microseconds."""
    tracer = open_tracer(TraceSettings(endpoint, 0.01), {"service.name": "benchmark"})
    metadata: dict[str, str | bytes] = {"user-agent": "grpc-python/1.85.1", "x-request-id": "17"}
    head = link_pb2.RequestHead(request_id="17", model="identity", rows=1)
    request, tracing = _Unsampled(), StepTracing(tracer, 0, {})

    call: Any = _Called(metadata)

    def gateway() -> object:
        return open_span(tracer, call, 0.0) if tracer.is_on else None

    def orchestrator() -> object:
        RequestTrace.of(head.traceparent, tracer, 0.0)
        return begun([request], "group", 1, 0.0)  # type: ignore[list-item]

    def leader() -> object:
        return tracing.open(head.traceparent)

    # The lookup is drawn again and again: one in a hundred is sampled here, and pays for its span.
    found = [("gateway", microseconds(gateway)), ("orchestrator", microseconds(orchestrator)), ("leader", microseconds(leader))]
    context = new_trace()
    found.append(("a sampled span, made and queued", microseconds(lambda: tracer.record(child_of(context, "x", 0.0)), 4000)))
    tracer.close(10.0)
    return found


@dataclass
class Side:
    """One of the meshes."""

    client: AsyncClient
    clock: CpuClock
    #: The gateway's.
    endpoint: str


def member_tls(certs: Path, role: str) -> dict[str, object]:
    """The settings of a member with that role's certificate."""
    return {"tls_cert": str(certs / f"{role}.pem"), "tls_key": str(certs / f"{role}.key"), "tls_ca": str(certs / "ca.pem")}


@asynccontextmanager
async def mesh_of(folder: Path, settings: dict[str, object], certs: Path | None = None) -> AsyncIterator[Side]:
    """A mesh that serves `identity`, and a client of it; with TLS where there are `certs`, as `tensorway certs` makes them."""
    folder.mkdir()
    url = f"directory:{folder}/registry"
    shared = {"registry": url, "listen": "127.0.0.1:0", "ops_listen": "127.0.0.1:0", "log_format": "json", **settings}
    flags = {
        service: flags_of({**shared, **({} if certs is None else member_tls(certs, ROLE_OF_KIND[service])), **more})
        for service, more in (
            ("gateway", {}), ("orchestrator", {}), ("node", {"models_dir": str(ROOT / "models"), "models": '["identity"]'})
        )
    }
    async with AsyncExitStack() as stack:
        processes = await stack.enter_async_context(LocalMesh(folder / "logs"))
        registry = open_registry(url)
        stack.push_async_callback(registry.close)
        await processes.start([MemberPlan(service, service, words) for service, words in flags.items()])
        pids: dict[str, tuple[int, ...]] = {}
        endpoint = ""
        async with asyncio.timeout(120):
            for kind in KINDS:
                async for members in registry.watch(kind):
                    if members:
                        pids[kind] = (int(members[0].metadata["pid"]),)
                        endpoint = members[0].endpoint if kind == GATEWAY else endpoint
                        break
        client = await stack.enter_async_context(AsyncClient(endpoint, tls=False if certs is None else Tls(ca=str(certs / "ca.pem"))))
        yield Side(client, CpuClock(pids), endpoint)


async def turn(side: Side, seconds: float, in_flight: int) -> tuple[dict[str, float], float]:
    """CPU microseconds a request by service, and the middle latency, ms."""
    row = {"input": np.ones((1, 256), dtype=np.float32)}
    took: list[float] = []
    ends_s = time.monotonic() + seconds

    async def ask() -> None:
        while time.monotonic() < ends_s:
            began_s = time.monotonic()
            await side.client.infer("identity", row)
            took.append(time.monotonic() - began_s)

    before = side.clock.read()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(in_flight):
            tasks.create_task(ask())
    after = side.clock.read()
    return {kind: (after[kind] - before[kind]) / 1e3 / len(took) for kind in KINDS}, statistics.median(took) * 1e3


async def meshes(endpoint: str, seconds: float, rounds: int, in_flight: int) -> dict[str, dict[str, float]]:
    """The middle of all rounds, by mesh."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in MESHES}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides: dict[str, Side] = {}
        for number, (name, share) in enumerate(MESHES.items()):
            settings: dict[str, object] = {} if share is None else {"trace_endpoint": endpoint, "trace_sample": share}
            sides[name] = await stack.enter_async_context(mesh_of(folder / str(number), settings))
            await turn(sides[name], 1.0, in_flight)
        for number in range(rounds):
            # Another one begins each round.
            order = [*sides][number % 4 :] + [*sides][: number % 4]
            for name in order:
                cpu, latency_ms = await turn(sides[name], seconds, in_flight)
                results[name].append({**cpu, "all": sum(cpu.values()), "p50_ms": latency_ms})
                print(name, {key: round(value, 1) for key, value in results[name][-1].items()}, flush=True)
    for found in results.values():
        for one, off in zip(found, results["off"], strict=True):
            # Of one round: what else the machine did meets both.
            one["to_off"] = one["all"] / off["all"]
    middle = {name: {key: statistics.median(one[key] for one in found) for key in found[0]} for name, found in results.items()}
    for name, found in results.items():
        quarters = statistics.quantiles((one["to_off"] for one in found), n=4)
        middle[name] |= {"least": quarters[0], "most": quarters[2]}
    return middle


@asynccontextmanager
async def receiver() -> AsyncIterator[str]:
    """Takes spans, in this process; where it listens."""
    server = create_server(ServerOptions("127.0.0.1:0"))

    async def export(message: bytes, call: Call) -> bytes:
        return otlp.ExportTraceServiceResponse().SerializeToString()

    server.add_unary(EXPORT, export)
    endpoint = await server.start()
    try:
        yield endpoint
    finally:
        await server.stop(0.0)


async def measure(chosen: argparse.Namespace) -> None:
    async with receiver() as endpoint:
        found = await asyncio.to_thread(parts, endpoint)
        print("\n| unsampled request, tracing on | µs |\n| --- | ---: |")
        for name, cost in found:
            print(f"| {name} | {cost:.2f} |")
        print(f"| all three services together | {sum(cost for _, cost in found[:3]):.2f} |\n", flush=True)
        middle = await meshes(endpoint, chosen.seconds, chosen.rounds, chosen.in_flight)
    print("\n| tracing | gateway CPU µs a request | orchestrator | leader | all | to off | its middle half | p50 ms |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, one in middle.items():
        print(
            f"| {name} | {one[GATEWAY]:.0f} | {one[ORCHESTRATOR]:.0f} | {one[GROUP]:.0f} | {one['all']:.0f} | "
            f"{one['to_off']:.2f} | {one['least']:.2f} to {one['most']:.2f} | {one['p50_ms']:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--in-flight", type=int, default=16)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()

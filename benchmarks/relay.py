"""`python -m benchmarks.relay`: what gateway and orchestrator pay for each token that they relay.

Real services as processes, a leader that says a token to each stream at every tick, and a client that reads. The steps of a group make a
token for all its streams at about the same time, so do the ticks. CPU is each process's own, less what it takes without any stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.cpu import CpuClock
from tensorway.cli.local_mesh import LocalMesh, MemberPlan, flags_of
from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import GATEWAY, GROUP, ORCHESTRATOR

ROOT = Path(__file__).parent.parent
SERVICES = (GATEWAY, ORCHESTRATOR)


@asynccontextmanager
async def child(module: str, *arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that lives until its input ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *map(str, arguments), cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.stdin.close()
        await process.wait()


async def say(process: asyncio.subprocess.Process, line: str) -> str:
    """Writes a line, unless it is empty, and reads one."""
    assert process.stdin is not None
    assert process.stdout is not None
    if line:
        process.stdin.write(line.encode() + b"\n")
    answer = await process.stdout.readline()
    if not answer:
        raise RuntimeError("the load ended")
    return answer.decode().strip()


async def found(registry: DirectoryRegistry) -> tuple[str, CpuClock]:
    """The gateway's endpoint, and the services' clock, once all are there."""
    pids: dict[str, tuple[int, ...]] = {}
    endpoint = ""
    async with asyncio.timeout(60):
        for kind in (*SERVICES, GROUP):
            async for members in registry.watch(kind):
                if members:
                    pids[kind] = (int(members[0].metadata["pid"]),)
                    endpoint = members[0].endpoint if kind == GATEWAY else endpoint
                    break
    return endpoint, CpuClock({kind: pids[kind] for kind in SERVICES})


def per_second(before: Mapping[str, int], after: Mapping[str, int], seconds: float) -> dict[str, float]:
    return {name: (after[name] - before[name]) / seconds for name in before}


async def measure(chosen: argparse.Namespace) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shared = {"registry": f"directory:{folder}/registry", "listen": "127.0.0.1:0", "ops_listen": "127.0.0.1:0", "log_format": "text"}
        gateway = {**shared, **({"transport": chosen.transport} if chosen.transport else {})}
        async with LocalMesh(folder / "logs") as mesh, DirectoryRegistry(folder / "registry") as registry:
            await mesh.start([
                MemberPlan("gateway", "gateway", flags_of(gateway)), MemberPlan("orchestrator", "orchestrator", flags_of(shared)),
            ])
            async with child("benchmarks.relay_leader", folder / "registry", chosen.pace_ms):
                endpoint, clock = await found(registry)
                print(f"gateway and orchestrator are {clock.pids}", flush=True)
                await asyncio.sleep(2.0)
                before = clock.read()
                await asyncio.sleep(chosen.idle_seconds)
                idle = per_second(before, clock.read(), chosen.idle_seconds)
                async with child("benchmarks.relay_load", endpoint, chosen.streams, chosen.connections) as load:
                    await say(load, "")
                    await asyncio.sleep(1.0)
                    return [await _round(load, clock, idle, chosen.seconds) for _ in range(chosen.rounds)]


async def _round(load: asyncio.subprocess.Process, clock: CpuClock, idle: Mapping[str, float], seconds: float) -> dict[str, float]:
    """CPU microseconds for each token, and what the readers saw."""
    await say(load, "begin")
    loop = asyncio.get_running_loop()
    before, began_s = clock.read(), loop.time()
    await asyncio.sleep(seconds)
    after, took_s = clock.read(), loop.time() - began_s
    seen: dict[str, float] = json.loads(await say(load, "end"))
    cost = {kind: (after[kind] - before[kind] - idle[kind] * took_s) / 1e3 / seen["num_tokens"] for kind in SERVICES}
    result = {**cost, "both": sum(cost.values()), **seen}
    print(" ".join(f"{key} {value:.2f}" for key, value in result.items()), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--connections", type=int, default=1, help="the streams are spread over so many of the client's")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pace-ms", type=float, default=40.0, help="between two tokens of a stream")
    parser.add_argument("--idle-seconds", type=float, default=4.0, help="without streams, before")
    parser.add_argument("--transport", default="", choices=("", "completion-queue", "aio"), help="the gateway's server")
    chosen = parser.parse_args()
    rounds = asyncio.run(measure(chosen))
    middle = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
    print("| streams | connections | pace ms | gateway CPU µs a token | orchestrator | both | from leader to client p50 ms | p99 ms |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    print(
        f"| {chosen.streams} | {chosen.connections} | {chosen.pace_ms:g} | {middle[GATEWAY]:.1f} | {middle[ORCHESTRATOR]:.1f} | "
        f"{middle['both']:.1f} | {middle['p50_ms']:.2f} | {middle['p99_ms']:.2f} |"
    )


if __name__ == "__main__":
    main()

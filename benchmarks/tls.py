"""`python -m benchmarks.tls`: what certificates on every hop cost a request.

Three meshes side by side, the same but for their links: local sockets in the clear (the default on one machine), gRPC in the clear, and
gRPC with TLS on every hop, the client's too. They get the same requests in turns, so that what else the machine does meets all of them; CPU
is the services' own. Connections are warm: what a handshake costs shows in a first call.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

from benchmarks.tracing import Side, mesh_of, turn
from tensorway import AsyncClient, Tls
from tensorway.cli.certs import Authority
from tensorway.tls import GATEWAY, ROLES

#: Settings, and whether there are certificates.
MESHES: dict[str, tuple[dict[str, object], bool]] = {
    "local links": ({}, False),
    "gRPC links": ({"local_links": "false"}, False),
    "gRPC links, TLS on every hop": ({"local_links": "false"}, True),
}
BASE = "gRPC links"


async def handshake_ms(endpoint: str, tls: Tls | bool, number: int) -> float:
    """The middle time of a first call on a new connection, ms."""
    took = []
    for _ in range(number):
        async with AsyncClient(endpoint, tls=tls) as client:
            began_s = time.monotonic()
            await client.is_ready()
            took.append(time.monotonic() - began_s)
    return statistics.median(took) * 1e3


async def measure(chosen: argparse.Namespace) -> None:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in MESHES}
    first_ms: dict[str, float] = {}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        authority = Authority.open_or_make(folder / "certs")
        for role in ROLES:
            authority.issue(role, ("127.0.0.1", "localhost") if role == GATEWAY else (), datetime.timedelta(days=1))
        sides: dict[str, Side] = {}
        for number, (name, (settings, is_secure)) in enumerate(MESHES.items()):
            certs = folder / "certs" if is_secure else None
            sides[name] = await stack.enter_async_context(mesh_of(folder / str(number), settings, certs))
            await turn(sides[name], 1.0, chosen.in_flight)
            tls = Tls(ca=str(folder / "certs" / "ca.pem")) if is_secure else False
            first_ms[name] = await handshake_ms(sides[name].endpoint, tls, 30)
        for number in range(chosen.rounds):
            for name in [*sides][number % 3 :] + [*sides][: number % 3]:
                cpu, latency_ms = await turn(sides[name], chosen.seconds, chosen.in_flight)
                results[name].append({"all": sum(cpu.values()), **cpu, "p50_ms": latency_ms})
    print(f"\n| mesh | CPU µs a request | of which gateway | orchestrator | leader | beside {BASE} | p50 ms | first call ms |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, found in results.items():
        middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
        ratio = statistics.median(one["all"] / base["all"] for one, base in zip(found, results[BASE], strict=True))
        shares = " | ".join(f"{middle[kind]:.0f}" for kind in middle if kind not in ("all", "p50_ms"))
        print(f"| {name} | {middle['all']:.0f} | {shares} | {ratio:.2f} | {middle['p50_ms']:.2f} | {first_ms[name]:.1f} |")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12, help="turns of each mesh")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a turn")
    parser.add_argument("--in-flight", type=int, default=8, help="requests at once")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()

"""Keeps Envoy's list of gateways as the registry tells it: registry → file → Envoy's file-based EDS. No xDS server is needed.

    python registry_eds.py --registry consul://127.0.0.1:8500 --output /run/envoy/gateways.json

The file is replaced as a whole, by rename, which is what Envoy watches for. It is written before the program says `watching`, so that an
Envoy that starts afterwards finds it. While the registry is away the last list stays; so it does when a registry says that there is no
gateway at all, for Envoy asks each for its health itself and skips what is dead. Ends on SIGTERM and SIGINT with status 0, with 1 where the
registry URL or the output cannot be used.

The file holds an envoy.config.endpoint.v3.ClusterLoadAssignment (Envoy API v3). Envoy resolves no names in it, so names are resolved here;
a gateway whose name does not resolve is left out, with a line on standard error. Gateways with a unix: endpoint are left out too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorway.config import default_registry
from tensorway.errors import TensorwayError
from tensorway.registry import open_registry
from tensorway.registry.port import GATEWAY, Registration

CLUSTER = "gateways"
_TYPE = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


def assignment(addresses: Sequence[tuple[str, int, str]]) -> dict[str, Any]:
    """The file's content for gateways as (IP address, port, zone); a zone becomes Envoy's locality."""
    zones = sorted({zone for _, _, zone in addresses})
    localities = [
        {
            **({"locality": {"zone": zone}} if zone else {}),
            "lb_endpoints": [
                {"endpoint": {"address": {"socket_address": {"address": address, "port_value": port}}}}
                for address, port, home in sorted(addresses) if home == zone
            ],
        }
        for zone in zones
    ]
    return {"resources": [{"@type": _TYPE, "cluster_name": CLUSTER, "endpoints": localities}]}


async def addresses_of(members: Sequence[Registration]) -> list[tuple[str, int, str]]:
    """Each gateway as (IP address, port, zone); the first address of a name that has several."""
    found = []
    for member in members:
        host, _, port = member.endpoint.rpartition(":")
        if member.endpoint.startswith("unix:"):
            print(f"registry_eds: {member.id} listens on {member.endpoint} only, and is left out", file=sys.stderr)
            continue
        try:
            answers = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except OSError as error:
            print(f"registry_eds: {member.id} is left out: {host} cannot be resolved: {error}", file=sys.stderr)
            continue
        found.append((str(answers[0][4][0]), int(port), member.metadata.get("zone", "")))
    return found


def replace(output: Path, content: dict[str, Any]) -> None:
    """Writes beside the file and renames: a reader sees the old or the new one, whole."""
    beside = output.with_name(f".{output.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    beside.replace(output)


async def follow(registry_url: str, output: Path) -> None:
    """Never returns. Raises TensorwayError where the registry URL is wrong, OSError where the file cannot be written."""
    registry = open_registry(registry_url)
    written: dict[str, Any] | None = None
    if not output.exists():
        replace(output, assignment([]))
    try:
        async for members in registry.watch(GATEWAY):
            addresses = await addresses_of(members)
            content = assignment(addresses)
            if written is None or (addresses and content != written):
                if addresses:
                    replace(output, content)
                    written = content
                print(f"registry_eds: watching, {len(addresses)} gateways", file=sys.stderr, flush=True)
    finally:
        await registry.close()


async def run(registry_url: str, output: Path) -> int:
    loop = asyncio.get_running_loop()
    following = loop.create_task(follow(registry_url, output))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, following.cancel)
    try:
        await following
    except asyncio.CancelledError:
        return 0
    except (TensorwayError, OSError) as error:
        print(f"registry_eds: {error}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Keeps Envoy's list of gateways as the registry tells it.")
    parser.add_argument("--registry", default=os.environ.get("TENSORWAY_REGISTRY") or default_registry(), help="as every service's")
    parser.add_argument("--output", type=Path, required=True, help="file that Envoy watches, in a directory of its own")
    options = parser.parse_args()
    return asyncio.run(run(options.registry, options.output))


if __name__ == "__main__":
    raise SystemExit(main())

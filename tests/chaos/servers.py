"""Whether a cluster of Consul servers is whole, asked from this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import aiohttp

from tests.consul.agent import Agent

_TIMEOUT: Final = aiohttp.ClientTimeout(total=2.0)


async def missing_server(servers: Mapping[str, Agent]) -> str:
    """What the cluster lacks: a server, an answer of one, agreement on a leader, a follower that keeps up; empty for nothing."""
    leaders: set[str] = set()
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as http:
        for name, server in servers.items():
            if not server.is_running:
                return f"{name} does not run"
            try:
                async with http.get(f"http://{server.http}/v1/status/leader") as response:
                    leaders.add(str(await response.json()))
                async with http.get(f"http://{server.http}/v1/operator/autopilot/health") as response:
                    if response.status != 200:  # 429 while any server is behind
                        return f"{name} says that the cluster is not healthy"
            except (aiohttp.ClientError, TimeoutError) as error:
                return f"{name} does not answer: {error!r}"
    return "" if len(leaders) <= 1 and "" not in leaders else f"the servers see {len(leaders)} leaders"

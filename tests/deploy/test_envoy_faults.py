"""Gateways killed, stopped and ended under load behind the real Envoy."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tensorway import AsyncClient
from tensorway.errors import TensorwayError, Unavailable
from tensorway.registry.port import GATEWAY
from tests.deploy.envoy import Envoy, rendered, running_envoy
from tests.deploy.fleet import Fleet, running_fleet

#: Callers at once.
NUM_CALLERS = 4
#: Longer than the second between two looks of Envoy.
DRAIN_DELAY_S = 2.0


@dataclass(eq=False)
class Load:
    """Callers that each send one request after another, without retries of their own, and check every answer."""

    client: AsyncClient
    num_answered: int = 0
    errors: list[TensorwayError] = field(default_factory=list)
    is_over: bool = False

    async def call(self, number: int) -> None:
        sent = np.full((1, 16), float(number), np.float32)
        while not self.is_over:
            try:
                answer = await self.client.infer("echo", {"x": sent}, timeout_s=20)
            except TensorwayError as error:
                self.errors.append(error)
                continue
            assert answer["y"].tobytes() == sent.tobytes()
            self.num_answered += 1
            await asyncio.sleep(0.01)

    async def more(self, count: int) -> None:
        """Returns once `count` more have been answered."""
        target = self.num_answered + count
        async with asyncio.timeout(60):
            while self.num_answered < target:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def load(envoy: Envoy, retries: int = 0) -> AsyncIterator[Load]:
    """Load that goes on while the block runs."""
    async with AsyncClient(envoy.endpoint, retries=retries) as client, asyncio.TaskGroup() as tasks:
        running = Load(client)
        for number in range(NUM_CALLERS):
            tasks.create_task(running.call(number))
        await running.more(50)
        yield running
        running.is_over = True


@asynccontextmanager
async def behind_envoy(folder: Path) -> AsyncIterator[tuple[Fleet, Envoy]]:
    """Two gateways behind an Envoy that holds both for healthy."""
    async with running_fleet(folder / "fleet", drain_delay_s=DRAIN_DELAY_S) as fleet:
        config = rendered(folder / "envoy", "front-proxy.yaml", {"gateways": await fleet.endpoints()})
        async with running_envoy(config) as envoy:
            await envoy.wait_healthy("gateways", 2)
            yield fleet, envoy


async def test_a_gateway_that_ends_costs_nothing_and_one_that_dies_what_it_held(tmp_path: Path) -> None:
    """SIGTERM, then SIGKILL, on one fleet; callers that retry notice neither."""
    async with behind_envoy(tmp_path) as (fleet, envoy), load(envoy) as running, load(envoy, retries=3) as patient:
        (endpoint,) = [member.endpoint for member in await fleet.registry.registrations(GATEWAY) if member.id == "gateway-1"]

        assert await fleet.stop("gateway-1") == 0
        await running.more(100)
        assert running.errors == []

        # A gateway that is back on its address before Envoy has looked would be asked before it is ready.
        await envoy.wait_hosts("gateways", lambda hosts: any("/failed_active_hc" in word for word in hosts.values()))
        await fleet.start("gateway-1", listen=endpoint)
        await envoy.wait_healthy("gateways", 2)
        await fleet.kill("gateway-2")
        # What it held is lost, and what came in the milliseconds in which its connections broke; then nothing more.
        await envoy.wait_hosts("gateways", lambda hosts: any("/failed_active_hc" in word for word in hosts.values()))
        assert {type(error) for error in running.errors} <= {Unavailable}
        num_lost = len(running.errors)
        await running.more(100)
        assert len(running.errors) == num_lost
        assert patient.errors == []
        await fleet.kill("gateway-1")


async def test_envoy_cuts_at_the_callers_deadline_where_a_gateway_hangs(tmp_path: Path) -> None:
    async with running_fleet(tmp_path / "fleet", gateways=1) as fleet:
        config = rendered(tmp_path / "envoy", "front-proxy.yaml", {"gateways": await fleet.endpoints()})
        async with running_envoy(config) as envoy:
            await envoy.wait_healthy("gateways", 1)
            pid = fleet.processes.members["gateway-1"].process.pid
            os.kill(pid, signal.SIGSTOP)
            try:
                begun_s = time.monotonic()
                url = f"http://{envoy.endpoint}/v1/models/echo"
                async with envoy.http.get(url, headers={"grpc-timeout": "700m"}) as response:
                    assert response.status == 504, await response.text()
                assert 0.6 <= time.monotonic() - begun_s < 10
                # Soon its health says so too: the next are refused at once, and nobody is sent there.
                await envoy.wait_hosts("gateways", lambda hosts: "healthy" not in hosts.values())
                async with envoy.http.get(url) as response:
                    assert response.status == 503
                async with envoy.http.get(f"http://{envoy.endpoint}/healthz") as response:
                    assert response.status == 503
            finally:
                await fleet.kill("gateway-1")

"""One fleet and one Envoy for all tests of this package that hurt nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.deploy.envoy import Envoy, rendered, running_envoy
from tests.deploy.fleet import Fleet, running_fleet


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """Two gateways, gateway-1 and gateway-2."""
    async with running_fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def front(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Envoy]:
    """front-proxy.yaml before the two, which it holds for healthy."""
    config = rendered(tmp_path_factory.mktemp("front"), "front-proxy.yaml", {"gateways": await fleet.endpoints()})
    async with running_envoy(config) as envoy:
        await envoy.wait_healthy("gateways", 2)
        yield envoy

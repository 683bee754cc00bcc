"""Where the promises of the registry's port are put to the test: a directory, and a real Consul agent."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from tensorway.registry import open_registry
from tensorway.registry.port import Registry
from tests.consul.agent import Agent, dev_agent

_NUMBERS = itertools.count(1)


@dataclass
class Ground:
    """A registry that processes can meet in."""

    #: For owners that serve gRPC.
    url: str
    #: For registrations of this process, behind which nothing listens.
    own_url: str
    _stack: AsyncExitStack = field(repr=False)

    async def open(self) -> Registry:
        """One more registry object, closed with the test."""
        registry = open_registry(self.own_url)
        self._stack.push_async_callback(registry.close)
        return registry


def ground_of(agent: Agent, stack: AsyncExitStack, prefix: str = "") -> Ground:
    """A mesh of its own at `agent`."""
    prefix = prefix or f"mesh-{next(_NUMBERS)}"
    return Ground(agent.registry_url(prefix), agent.registry_url(prefix, check="ttl"), stack)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_agent(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Agent]:
    """One agent for all tests that do it no harm."""
    async with dev_agent(tmp_path_factory.mktemp("consul")) as started:
        yield started


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    """An agent to be hurt. It keeps nothing over a restart."""
    async with dev_agent(tmp_path / "agent") as started:
        yield started


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


@pytest.fixture(params=["directory", "consul"])
def ground(request: pytest.FixtureRequest, tmp_path: Path, stack: AsyncExitStack) -> Ground:
    if request.param == "directory":
        url = f"directory:{tmp_path / 'registry'}"
        return Ground(url, url, stack)
    return ground_of(request.getfixturevalue("shared_agent"), stack)


@pytest.fixture
async def registry(ground: Ground) -> Registry:
    return await ground.open()

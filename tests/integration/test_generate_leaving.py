"""Those who leave a stream in the middle: clients that cancel, vanish or run out of time, connections that break, services that stop."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio

from tensorway import AsyncClient, Client, Delta
from tensorway.errors import DeadlineExceeded
from tensorway.registry.port import GATEWAY, NODE, ORCHESTRATOR
from tests.integration.conftest import ROOT, running_mesh
from tests.integration.generate_world import PROMPT, Talk, Told, ask, error_of, small, talk_of
from tests.integration.test_faults import usage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.asyncio(loop_scope="module")]

MODEL = "pair"
#: Tokens of an answer that is hurt on its way, and of one that nobody waits for to end.
LONG = 120
ENDLESS = 900
NUM_CLIENTS = 50


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def talk(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Talk]:
    """A model with a group on each of two nodes; two orchestrators and two gateways."""
    folder = tmp_path_factory.mktemp("talk")
    models = folder / "models"
    small(models, MODEL, longest=1024, replicas=2, generation={"kv_cache_mb": 32, "max_sequences": 16})
    settings = {"heartbeat_s": 0.25, "spread_wait_s": 30.0}
    async with running_mesh(folder, MODEL, models_dir=models, orchestrators=2, nodes=2, **settings) as mesh, talk_of(mesh) as made:
        await mesh.start("gateway-2", "gateway")
        await mesh.wait_members(GATEWAY, 2)
        await made.serving(MODEL, 2)
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole(talk: Talk) -> Told:
    """The answer that nobody disturbs."""
    return await talk.answer(ask(MODEL, PROMPT, LONG))


async def all_free(talk: Talk) -> list[int]:
    """The free blocks of the groups, once none of them has an answer left, and no stream is open."""
    free: list[int] = []
    for group in await talk.groups(MODEL):
        idle = await talk.until_group(
            MODEL, lambda one, id=group.id: one.id == id and not one.num_running_answers + one.num_waiting_answers  # type: ignore[misc]
        )
        free.append(idle.num_free_blocks)
    async with asyncio.timeout(60):
        while any((await talk.measure(ORCHESTRATOR, "tensorway_orchestrator_open_streams", MODEL)).values()):
            await asyncio.sleep(0.05)
    return free


async def said(talk: Talk) -> float:
    """Tokens that groups have said so far."""
    return sum((await talk.measure(ORCHESTRATOR, "tensorway_orchestrator_tokens_total", MODEL)).values())


async def cancel(talk: Talk, count: int) -> None:
    """So many clients that go once they have a few tokens, some of them together with their connection."""
    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            tasks.create_task(leave(talk, number))


async def leave(talk: Talk, number: int) -> None:
    async with talk.call(ask(MODEL, [3 + number, 4, 5], ENDLESS)) as call:
        await call.tokens(1 + number % 3)


async def vanish(talk: Talk, count: int) -> None:
    """A process with so many streams is killed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, ROOT / "tests" / "integration" / "generate_client.py", talk.mesh.endpoint, MODEL, str(count), str(ENDLESS),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        assert await asyncio.wait_for(process.stdout.readline(), 120) == b"all begun\n"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def run_late(talk: Talk, count: int) -> None:
    """So many clients whose time is too short."""
    async with asyncio.TaskGroup() as tasks:
        ended = [tasks.create_task(run_out(talk, number)) for number in range(count)]
    assert all(isinstance(end.result(), DeadlineExceeded) for end in ended), ended


async def run_out(talk: Talk, number: int) -> object:
    async with talk.call(ask(MODEL, [3 + number, 4, 5], ENDLESS), timeout_s=0.4 + 0.01 * (number % 5)) as call:
        return await error_of(call)


async def test_who_leaves_leaves_nothing_behind(talk: Talk) -> None:
    """All blocks are free again long before the answers would have ended, and the services hold what they held before."""
    await cancel(talk, NUM_CLIENTS // 2)
    await vanish(talk, 10)
    free = await all_free(talk)
    assert min(free) > 0
    pids = {name: member.process.pid for name, member in talk.mesh.processes.members.items()}
    pids |= {row.id: int(row.metadata["pid"]) for row in await talk.mesh.leaders()}
    before = {name: usage(pid) for name, pid in pids.items()}
    for way, count in ((cancel, NUM_CLIENTS), (vanish, 16), (run_late, NUM_CLIENTS)):
        said_before = await said(talk)
        await way(talk, count)
        assert await all_free(talk) == free
        num_said = await said(talk) - said_before
        assert num_said < count * ENDLESS / 2, f"{way.__name__}: {num_said} tokens were said to {count} who had left"
    (await talk.answer(ask(MODEL, PROMPT, LONG // 2))).finished()
    for name, pid in pids.items():
        descriptors, threads = usage(pid)
        assert descriptors <= before[name][0] + 4, (name, before[name], usage(pid))
        # grpc's own event engine keeps a few threads more or less.
        assert threads <= before[name][1] + 4, (name, before[name], usage(pid))


class Proxy:
    """Carries bytes between clients and an endpoint, until it is cut."""

    def __init__(self, endpoint: str) -> None:
        self._host, _, port = endpoint.rpartition(":")
        self._port = int(port)
        self._writers: set[asyncio.StreamWriter] = set()
        self.num_connections = 0

    def cut(self) -> None:
        """Breaks all connections at once; new ones are welcome."""
        for writer in self._writers:
            writer.transport.abort()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        there = await asyncio.open_connection(self._host, self._port)
        self._writers |= {writer, there[1]}
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_carry(reader, there[1]))
            tasks.create_task(_carry(there[0], writer))
        self._writers -= {writer, there[1]}


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while (data := await reader.read(65536)):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        # The other side was cut; so is this one.
        writer.transport.abort()
    writer.close()


@asynccontextmanager
async def proxy_to(endpoint: str) -> AsyncIterator[tuple[Proxy, str]]:
    proxy = Proxy(endpoint)
    server = await asyncio.start_server(proxy.connected, "127.0.0.1", 0)
    try:
        yield proxy, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        proxy.cut()


async def test_the_client_takes_a_cut_stream_up_again(talk: Talk, whole: Told) -> None:
    ids: list[int] = []
    async with proxy_to(talk.mesh.endpoint) as (proxy, endpoint), AsyncClient(endpoint) as client:
        async for event in client.generate(MODEL, PROMPT, max_tokens=LONG, ignore_eos=True, timeout_s=120):
            if isinstance(event, Delta):
                assert event.offset == len(ids)
                ids += event.token_ids
                if len(ids) in (10, 60):
                    proxy.cut()
        assert proxy.num_connections >= 3
    assert ids == whole.ids()


async def test_the_blocking_client_takes_a_cut_stream_up_again(talk: Talk, whole: Told) -> None:
    loop = asyncio.get_running_loop()

    def use(endpoint: str, proxy: Proxy) -> list[int]:
        ids: list[int] = []
        with Client(endpoint) as client:
            for event in client.generate(MODEL, PROMPT, max_tokens=LONG, ignore_eos=True, timeout_s=120):
                if isinstance(event, Delta):
                    ids += event.token_ids
                    if len(ids) == 10:
                        loop.call_soon_threadsafe(proxy.cut)
        return ids

    async with proxy_to(talk.mesh.endpoint) as (proxy, endpoint):
        assert await asyncio.to_thread(use, endpoint, proxy) == whole.ids()
        assert proxy.num_connections >= 2


async def busy(talk: Talk, service: str) -> str:
    """A member that has streams now. Of the gateways, both have."""
    if service == "node":
        return (await talk.until_group(MODEL, lambda one: one.num_running_answers > 0)).ranks[0].node
    if service == "orchestrator":
        num_open = await talk.measure(ORCHESTRATOR, "tensorway_orchestrator_open_streams", MODEL)
        return max(num_open, key=lambda name: num_open[name])
    return "gateway-2"


@pytest.mark.parametrize("service", ["node", "orchestrator", "gateway"])
async def test_a_service_that_stops_finishes_its_streams(talk: Talk, whole: Told, service: str) -> None:
    """SIGTERM in the middle of answers to a member that has some of them; they end like others, and so does it."""
    gateways = sorted(row.endpoint for row in await talk.mesh.members(GATEWAY))
    calls = [talk.call(ask(MODEL, PROMPT, LONG), gateways[number % 2]) for number in range(6)]
    for call in calls:
        await call.tokens(3)
    name = await busy(talk, service)
    victim = talk.mesh.processes.members[name]
    victim.process.send_signal(signal.SIGTERM)
    for call in calls:
        (await call.rest()).is_same(whole)
    assert await asyncio.wait_for(victim.process.wait(), 60) == 0, victim.last_lines()
    await talk.mesh.start(name, service)
    await talk.mesh.wait_members({"node": NODE, "orchestrator": ORCHESTRATOR, "gateway": GATEWAY}[service], 2)
    await talk.serving(MODEL, 2)
    (await talk.answer(ask(MODEL, PROMPT, 3))).finished()


async def test_a_node_in_haste_hands_its_streams_over(talk: Talk, whole: Told) -> None:
    """Its time to stop is shorter than the answers: they go on at the other node."""
    for name in ("node-1", "node-2"):
        await talk.mesh.processes.stop_member(talk.mesh.processes.members[name])
    await talk.mesh.start("node-1", "node")
    await talk.mesh.start("node-2", "node", grace_s=0.2)
    rows = await talk.serving(MODEL, 2)
    assert {row.metadata["node"] for row in rows} == {"node-1", "node-2"}
    calls = [talk.call(ask(MODEL, PROMPT, LONG)) for _ in range(6)]
    for call in calls:
        await call.tokens(3)
    victim = talk.mesh.processes.members["node-2"]
    victim.process.send_signal(signal.SIGTERM)
    for call in calls:
        (await call.rest()).is_same(whole)
    assert any(call.told.finished().num_attempts > 1 for call in calls)
    await asyncio.wait_for(victim.process.wait(), 60)

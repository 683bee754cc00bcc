"""Groups of several ranks hurt with real signals, real failures and real lack of memory, while requests are on their way."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from tensorway import AsyncClient, Explain
from tensorway.errors import DeadlineExceeded, ModelFailed, OutOfMemory, Overloaded, TensorwayError, Unavailable
from tensorway.registry.port import GROUP, NODE
from tensorway.transport.channel import AsyncChannel
from tensorway.v1 import node_pb2
from tests.integration.conftest import Mesh, running_mesh
from tests.integration.hurt_groups import (
    FILL,
    RAISE,
    RECOVERY_S,
    SLEEP,
    History,
    Report,
    ask,
    children,
    history_of,
    is_right,
    listening_of,
    pids_of,
    real,
    send_for_epoch,
    sessions,
    staged,
)
from tests.integration.test_faults import usage, wait_gone
from tests.integration.test_mesh import run
from tests.integration.test_up import TENSORWAY

pytestmark = [pytest.mark.models, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

HUNG_AFTER_S = 2.0
MAX_STEP_S = 5.0
#: How much later than its deadline a request may end.
LATE_S = 0.5
SHAPES = ((2, 1), (1, 2), (2, 2))
#: Of the model `guarded`: memory that each rank fills for each row in both of its layers, and its limit.
ROW_MB, GUARDED_MB = 64, 560
LIST_GROUPS = "/tensorway.v1.NodeService/ListGroups"


@dataclass
class World:
    """A mesh with a group of every shape, a client of it, and what its node says."""

    mesh: Mesh
    client: AsyncClient
    history: History
    #: Where its processes put temporary files.
    temporary: Path = Path()

    async def call(self, model: str, *orders: tuple[int, int, int], timeout_s: float = RECOVERY_S) -> TensorwayError | None:
        """One request. Its answer must be right; what it fails with is returned; either comes in time."""
        inputs = ask(*orders)
        began_s = time.monotonic()
        try:
            output = (await self.client.infer(model, inputs, timeout_s=timeout_s))["y"]
        except TensorwayError as error:
            return error
        finally:
            took_s = time.monotonic() - began_s
            assert took_s < timeout_s + LATE_S, f"ended {took_s:.1f} s after its start, with a timeout of {timeout_s} s"
        assert is_right(inputs, output)
        return None

    async def call_all(self, model: str, ranks: tuple[int, ...], what: int) -> TensorwayError | None:
        """One request of one row with the same order for several ranks; what it fails with."""
        inputs = ask((0, what, 0))
        inputs["order"][0, 0] = sum(1 << rank for rank in ranks)
        try:
            await self.client.infer(model, inputs)
        except TensorwayError as error:
            return error
        return None

    async def answered(self, model: str) -> None:
        """Returns once a request is answered."""
        async with asyncio.timeout(RECOVERY_S):
            while isinstance(await self.call(model), Unavailable | DeadlineExceeded | Overloaded):
                await asyncio.sleep(0.02)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("groups")
    models = folder / "models"
    names = [
        *(staged(models, *shape) for shape in SHAPES),
        staged(models, 2, 1, "scant", settings={"room_mb": 4096}),
        staged(models, 2, 1, "guarded", settings={"row_mb": ROW_MB}, memory_limit_mb=GUARDED_MB),
        real(models, "minilm", "whole", threads=1),
        real(models, "minilm", "pipeline", threads=1, parallel={"pipeline": 2, "micro_batches": 2}),
        real(models, "minilm", "pipeline-1mb", threads=1, parallel={"pipeline": 2, "micro_batches": 1}),
    ]
    temporary = folder / "temporary"
    temporary.mkdir()
    patch = pytest.MonkeyPatch()
    patch.setenv("TMPDIR", str(temporary))
    async with (
        running_mesh(
            folder, *names, models_dir=models, hung_after_s=HUNG_AFTER_S, heartbeat_s=0.25, max_step_s=MAX_STEP_S
        ) as mesh,
        AsyncClient(mesh.endpoint, retries=0) as client,
        history_of(mesh) as history,
    ):
        patch.undo()
        yield World(mesh, client, history, temporary)


@dataclass(frozen=True)
class Footprint:
    """What the mesh holds of the machine."""

    zombies: int
    num_processes: int
    num_listening: int
    shared_memory: tuple[str, ...]
    temporary: tuple[str, ...]
    #: Open descriptors and threads of each service.
    services: dict[str, tuple[int, int]]


async def settled(world: World) -> Footprint:
    """The footprint once it has not changed for a second."""
    last, since_s = footprint(world), time.monotonic()
    async with asyncio.timeout(30):
        while time.monotonic() - since_s < 1.0:
            await asyncio.sleep(0.1)
            now = footprint(world)
            if now != last:
                last, since_s = now, time.monotonic()
    return last


def footprint(world: World) -> Footprint:
    members = world.mesh.processes.members
    found = {pid: state for member in members.values() for pid, state in children(member.process.pid).items()}
    return Footprint(
        zombies=sum(state == "Z" for state in found.values()),
        num_processes=len(found),
        num_listening=len(listening_of([*found, *(member.process.pid for member in members.values())])),
        shared_memory=tuple(sorted(os.listdir("/dev/shm"))),
        temporary=tuple(sorted(str(path.relative_to(world.temporary)) for path in world.temporary.rglob("*"))),
        services={name: usage(member.process.pid) for name, member in members.items()},
    )


async def hurt(world: World, shape: tuple[int, int], rank: int, number: int) -> tuple[Report, Report, list[TensorwayError | None]]:
    """Sends a signal to a rank in the middle of a step; the reports before and after, and how the requests ended."""
    model = f"staged-{shape[0]}x{shape[1]}"
    before = await world.history.ready(model)
    async with asyncio.TaskGroup() as tasks:
        slow = [tasks.create_task(world.call(model, (rank, SLEEP, 400))) for _ in range(2)]
        short = [tasks.create_task(world.call(model, timeout_s=0.8)) for _ in range(3)]
        await asyncio.sleep(0.2)
        os.kill(before["ranks"][rank]["pid"], number)
        await asyncio.sleep(0.05)
        late = [tasks.create_task(world.call(model, timeout_s=timeout_s)) for timeout_s in (0.5, RECOVERY_S)]
    after = await world.history.ready(model, before["epoch"] + 1)
    assert after["epoch"] == before["epoch"] + 1
    await wait_gone(*pids_of(before))
    await world.answered(model)
    return before, after, [task.result() for task in (*slow, *short, *late)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
async def test_each_rank_killed_in_the_middle_of_a_step(world: World, shape: tuple[int, int]) -> None:
    for rank in range(shape[0] * shape[1]):
        before, after, ended = await hurt(world, shape, rank, signal.SIGKILL)
        assert {type(error) for error in ended if error is not None} <= {Unavailable, DeadlineExceeded}, ended
        why = await world.history.why(before["model"], before["epoch"])
        assert why.startswith(f"rank {rank} on node-1 was killed by SIGKILL"), why
        registered = [row for row in await world.mesh.members(GROUP) if row.metadata["model"] == before["model"]]
        assert [int(row.metadata["epoch"]) for row in registered] == [after["epoch"]]
        refused = await send_for_epoch(after, before["epoch"])
        assert isinstance(refused, Unavailable)
        assert f"is in epoch {after['epoch']}" in refused.message
        assert await send_for_epoch(after, after["epoch"]) is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
async def test_each_rank_stopped_in_the_middle_of_a_step(world: World, shape: tuple[int, int]) -> None:
    """Its requests end at their deadlines or with the group, and it is the silent rank that is named, not those that wait for it."""
    for rank in stopped_ranks(shape):
        before, _, ended = await hurt(world, shape, rank, signal.SIGSTOP)
        assert {type(error) for error in ended if error is not None} <= {Unavailable, DeadlineExceeded, Overloaded}, ended
        why = await world.history.why(before["model"], before["epoch"])
        assert why.startswith(f"rank {rank} on node-1 has been silent for {HUNG_AFTER_S:.1f} s"), why


def stopped_ranks(shape: tuple[int, int]) -> tuple[int, ...]:
    """All of the small groups; of the large one those that no small group has: a later stage's shards."""
    return (0, 1) if shape != (2, 2) else (2, 3)


@pytest.mark.parametrize(
    ("shape", "ranks"), [((2, 1), (0,)), ((2, 1), (1,)), ((1, 2), (0, 1)), ((2, 2), (0, 1)), ((2, 2), (2, 3))], ids=str
)
async def test_an_exception_in_one_stage_fails_its_request_alone(world: World, shape: tuple[int, int], ranks: tuple[int, ...]) -> None:
    model = f"staged-{shape[0]}x{shape[1]}"
    before = await world.history.ready(model)
    # A slow step first, so that what follows is joined into one batch.
    async with asyncio.TaskGroup() as tasks:
        slow = tasks.create_task(world.call(model, (0, SLEEP, 300)))
        await asyncio.sleep(0.05)
        guilty = tasks.create_task(world.call_all(model, ranks, RAISE))
        others = [tasks.create_task(world.call(model)) for _ in range(4)]
    error = guilty.result()
    assert isinstance(error, ModelFailed)
    assert re.search(r"raised ValueError: order 2, for rank \d \(model.py:\d+ in obey\)", error.message), error
    assert [task.result() for task in (slow, *others)] == [None] * 5
    assert (await world.history.ready(model))["epoch"] == before["epoch"]


@pytest.mark.parametrize("shape", [(1, 2), (2, 2)], ids=str)
async def test_a_shard_that_raises_alone_ends_the_epoch(world: World, shape: tuple[int, int]) -> None:
    """The other shard waits for its sum for ever: no answer can come, and the group is formed anew."""
    model, rank = f"staged-{shape[0]}x{shape[1]}", shape[0] * shape[1] - 1
    before = await world.history.ready(model)
    error = await world.call(model, (rank, RAISE, 0), timeout_s=20.0)
    assert isinstance(error, TensorwayError)
    why = await world.history.why(model, before["epoch"])
    assert f"rank {rank} failed while the other shards of its stage did not" in why, why
    assert "order 2" in why
    await world.history.ready(model, before["epoch"] + 1)
    await world.answered(model)


async def test_a_step_that_is_too_long_on_a_follower_ends_the_epoch(world: World) -> None:
    model = "staged-2x1"
    before = await world.history.ready(model)
    slow = asyncio.ensure_future(world.call(model, (1, SLEEP, 60_000), timeout_s=2 * MAX_STEP_S))
    why = await world.history.why(model, before["epoch"])
    assert re.match(rf"rank \d on node-1: a step has run for \d+ s, longer than max_step_s={MAX_STEP_S:.0f}", why), why
    assert isinstance(await slow, Unavailable | DeadlineExceeded)
    # What was retried runs as long again, and costs another epoch.
    await world.answered(model)


async def test_real_lack_of_memory_fails_its_request_alone(world: World) -> None:
    """The address space of these ranks is limited: torch really gets no memory."""
    model = "scant"
    before = await world.history.ready(model)
    for rank in (1, 0):
        async with asyncio.TaskGroup() as tasks:
            others = [tasks.create_task(world.call(model)) for _ in range(3)]
            guilty = tasks.create_task(world.call(model, (rank, FILL, 1 << 14)))
        error = guilty.result()
        assert isinstance(error, OutOfMemory), error
        assert f"(rank {rank})" in error.message or rank == 0
        assert [task.result() for task in others] == [None] * 3
        assert await world.call(model) is None
    assert (await world.history.ready(model))["epoch"] == before["epoch"]


async def test_a_step_that_is_predicted_not_to_fit_is_split_or_refused(world: World) -> None:
    model = "guarded"
    before = await world.history.ready(model)
    limit = before["ranks"][0]["memory_limit_bytes"]
    assert limit == GUARDED_MB << 20
    async with asyncio.TaskGroup() as tasks:
        # While one step runs, the others are joined into one that does not fit.
        slow = tasks.create_task(world.call(model, (0, SLEEP, 300)))
        await asyncio.sleep(0.05)
        joined = [tasks.create_task(world.client.infer(model, ask())) for _ in range(7)]
    assert slow.result() is None
    assert all(is_right(ask(), task.result()["y"]) for task in joined)
    assert max(task.result().timing.batch_requests for task in joined) > 3
    with pytest.raises(OutOfMemory, match=r"predicted to need \d+ MiB of memory, and \d+ MiB may be used"):
        await world.client.infer(model, ask(rows=8))
    assert await world.call(model) is None
    (node,) = await world.mesh.members(NODE)
    async with closing_channel(node.endpoint) as channel:
        reply = await channel.unary(LIST_GROUPS, b"", 10.0)
    (group,) = [one for one in node_pb2.ListGroupsResponse.FromString(reply.response).groups if one.model == model]
    assert [rank.rank for rank in group.ranks] == [0, 1]
    assert all(0 < rank.memory_bytes < rank.memory_limit_bytes == limit for rank in group.ranks)
    assert all(0 < rank.weights_bytes < 1 << 20 for rank in group.ranks)
    assert group.epoch == before["epoch"]


async def test_five_deaths_leave_nothing_behind(world: World) -> None:
    model = "staged-2x1"
    await world.history.ready(model)
    before = await settled(world)
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGABRT, signal.SIGTERM, signal.SIGKILL):
        report = await world.history.ready(model)
        os.kill(report["ranks"][report["epoch"] % 2]["pid"], number)
        await world.history.ready(model, report["epoch"] + 1)
        await world.answered(model)
        assert not sessions(*pids_of(report))
    after = await settled(world)
    assert after.zombies == before.zombies == 0
    assert after.num_processes == before.num_processes
    assert after.num_listening == before.num_listening
    assert after.shared_memory == before.shared_memory
    assert after.temporary == before.temporary
    for name, (descriptors, threads) in after.services.items():
        assert descriptors <= before.services[name][0] + 2, (name, before, after)
        # grpc's own event engine keeps a few threads more or less.
        assert threads <= before.services[name][1] + 4, (name, before, after)


async def test_text_of_all_lengths_through_a_pipeline_equals_the_whole_model(world: World) -> None:
    """One caller: the batches are the same, and so is every bit. Many callers: batches differ, and so may the last bits."""
    texts = ["word " * (1 + number * 5 % 37) + str(number) for number in range(24)]
    for start in range(0, len(texts), 4):
        sent = {"text": texts[start : start + 4]}
        whole, cut = [(await world.client.infer(model, sent))["embedding"] for model in ("whole", "pipeline-1mb")]
        np.testing.assert_array_equal(cut, whole)
    whole = (await world.client.infer("whole", {"text": texts[:24]}))["embedding"]
    results = await asyncio.gather(*(
        world.client.infer("pipeline", {"text": texts[number % 24 : number % 24 + 1 + number % 3]}) for number in range(120)
    ))
    assert max(result.timing.batch_requests for result in results) > 1
    for number, result in enumerate(results):
        first = number % 24
        np.testing.assert_allclose(result["embedding"], whole[first : first + 1 + number % 3], atol=2e-6)


async def test_explaining_across_ranks_equals_explaining_in_one(world: World) -> None:
    texts = ["the cat sat on the mat", "shares fell", "a man plays the guitar in the rain tonight"]
    wishes = [
        Explain(method=method, output="embedding", index=(index,), num_points=6)
        for index, method in enumerate(("saliency", "input_x_gradient", "integrated_gradients"))
    ]
    wanted = {
        (text, wish): await world.client.explain("whole", {"text": [text]}, wish) for text in texts for wish in wishes
    }
    embeddings = {text: (await world.client.infer("whole", {"text": [text]}))["embedding"] for text in texts}

    async def explained(text: str, wish: Explain) -> None:
        found = await world.client.explain("pipeline", {"text": [text]}, wish)
        expected = wanted[text, wish]
        assert found["attribution"].shape == expected["attribution"].shape
        np.testing.assert_allclose(found["attribution"], expected["attribution"], atol=1e-6)
        np.testing.assert_allclose(found["score"], expected["score"], atol=1e-6)

    async def inferred(text: str) -> None:
        found = (await world.client.infer("pipeline", {"text": [text]}))["embedding"]
        np.testing.assert_allclose(found, embeddings[text], atol=2e-6)

    async with asyncio.TaskGroup() as tasks:
        for (text, wish) in wanted:
            tasks.create_task(explained(text, wish))
            tasks.create_task(inferred(text))


async def test_a_rank_killed_while_it_explains_fails_the_call_and_comes_back(world: World) -> None:
    before = await world.history.ready("pipeline")
    wish = Explain(method="integrated_gradients", output="embedding", index=(0,), num_points=1000)
    calls = [
        asyncio.ensure_future(world.client.explain("pipeline", {"text": ["a long way " * 20]}, wish, timeout_s=20.0)) for _ in range(2)
    ]
    await asyncio.sleep(0.5)
    assert not any(call.done() for call in calls)
    began_s = time.monotonic()
    os.kill(before["ranks"][1]["pid"], signal.SIGKILL)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert time.monotonic() - began_s < 20.0 + LATE_S
    assert all(not isinstance(one, BaseException) or isinstance(one, Unavailable | DeadlineExceeded) for one in outcomes), outcomes
    assert (await world.history.why("pipeline", before["epoch"])).startswith("rank 1 on node-1 was killed by SIGKILL")
    await world.history.ready("pipeline", before["epoch"] + 1)
    again = await world.client.explain("pipeline", {"text": ["once more"]}, Explain(method="saliency", output="embedding", index=(0,)))
    assert np.isfinite(again["attribution"]).all()


async def test_groups_that_cannot_start_back_off_and_say_why_in_every_place(tmp_path: Path) -> None:
    models = tmp_path / "models"
    staged(models, 2, 1, "broken")
    code = models / "broken" / "model.py"
    code.write_text(code.read_text() + "\nraise RuntimeError('written in haste')\n")
    staged(models, 2, 1, "dies", settings={"dies": 1})
    staged(models, 2, 1, "sleeps", settings={"sleeps": 1}, startup_timeout_s=9)
    words = {
        "broken": r"rank \d on node-1: load raised RuntimeError: written in haste \(model.py:\d+ in <module>\)",
        "dies": r"rank 1 on node-1 was killed by SIGABRT; its last lines: .*about to die",
        "sleeps": r"rank 1 on node-1.*state loading.*about to sleep",
    }
    async with running_mesh(tmp_path, models_dir=models) as mesh, AsyncClient(mesh.endpoint) as client, history_of(mesh) as history:
        for model, pattern in words.items():
            assert re.search(pattern, await history.why(model, 1)), model
        await history.until(lambda one: one["model"] == "dies" and one["state"] == "backing_off" and one["epoch"] > 1)
        waits = [float(one["detail"].split()[3]) for one in history.said if one["model"] == "dies" and one["state"] == "backing_off"]
        assert waits == sorted(waits) and waits[-1] > waits[0], waits
        async with asyncio.timeout(RECOVERY_S):
            while not all(re.search(pattern, (await client.model(model)).reason) for model, pattern in words.items()):
                await asyncio.sleep(0.05)
        (node,) = await mesh.members(NODE)
        async with closing_channel(node.endpoint) as channel:
            reply = await channel.unary(LIST_GROUPS, b"", 10.0)
        reasons = {group.model: group.reason for group in node_pb2.ListGroupsResponse.FromString(reply.response).groups}
        shown = re.sub(r"[\s│┃]+", "", await run(TENSORWAY, "models", "--endpoint", mesh.endpoint))
        log = mesh.processes.members["node-1"].log.read_text()
        for model, pattern in words.items():
            assert re.search(pattern, reasons[model]), model
            assert re.search(pattern, log), model
        for part in ("writteninhaste", "abouttodie", "abouttosleep"):
            assert part in shown, shown
        with pytest.raises(Unavailable, match="about to die"):
            await client.infer("dies", ask(), timeout_s=5.0)


@dataclass(eq=False)
class Load:
    """Callers that send one request after another."""

    num_answered: int = 0
    is_over: bool = False

    async def call(self, world: World, model: str) -> None:
        while not self.is_over:
            error = await world.call(model, timeout_s=20.0)
            assert error is None, error
            self.num_answered += 1


@asynccontextmanager
async def load_of(world: World, model: str) -> AsyncIterator[Load]:
    """Requests without end while the block runs; one that fails fails the block."""
    async with asyncio.TaskGroup() as tasks:
        load = Load()
        for _ in range(4):
            tasks.create_task(load.call(world, model))
        yield load
        load.is_over = True


def is_ready_at(report: Report, node: str, epoch: int) -> bool:
    return report["id"].endswith(f"@{node}") and report["state"] == "ready" and report["epoch"] >= epoch


async def group_of(history: History, node: str) -> Report:
    """The newest report of the group that serves on a node."""
    await history.until(lambda one: is_ready_at(one, node, 1))
    return next(one for one in reversed(history.said) if is_ready_at(one, node, 1))


@asynccontextmanager
async def closing_channel(endpoint: str) -> AsyncIterator[AsyncChannel]:
    channel = AsyncChannel(endpoint)
    try:
        yield channel
    finally:
        await channel.close()


async def test_with_a_second_replica_nothing_fails_whatever_dies(tmp_path: Path) -> None:
    """A rank killed, a rank stopped, a node told to stop, a node killed: no request fails, and another node takes over."""
    models = tmp_path / "models"
    model = staged(models, 2, 1, replicas=2)
    settings = {"hung_after_s": HUNG_AFTER_S, "heartbeat_s": 0.25, "spread_wait_s": 12.0}
    async with (
        running_mesh(tmp_path, model, models_dir=models, nodes=2, **settings) as mesh,
        AsyncClient(mesh.endpoint, retries=0) as client, history_of(mesh) as history,
    ):
        world = World(mesh, client, history)
        groups = {row.metadata["node"]: row for row in await mesh.wait_members(GROUP, 2)}
        assert groups.keys() == {"node-1", "node-2"}
        async with load_of(world, model) as load:
            for node, rank, number in (("node-1", 1, signal.SIGKILL), ("node-2", 0, signal.SIGKILL), ("node-1", 1, signal.SIGSTOP)):
                before = await group_of(history, node)
                os.kill(before["ranks"][rank]["pid"], number)
                await history.until(lambda one, node=node, after=before["epoch"]: is_ready_at(one, node, after + 1))
                await mesh.wait_members(GROUP, 2)
            assert load.num_answered > 100

            await mesh.start("node-3", "node")
            await mesh.wait_members(NODE, 3)
            first = mesh.processes.members["node-1"]
            ranks = pids_of(await group_of(history, "node-1"))
            await mesh.processes.stop_member(first)
            assert first.process.returncode == 0, first.last_lines()
            await wait_gone(*ranks)
            await history.until(lambda one: is_ready_at(one, "node-3", 1))
            await mesh.wait_members(GROUP, 2)

            second = mesh.processes.members["node-2"]
            ranks = pids_of(await group_of(history, "node-2"))
            second.process.kill()
            await second.process.wait()
            async with asyncio.timeout(1.0):
                await wait_gone(*ranks)
            await mesh.wait_members(GROUP, 2)
            await asyncio.sleep(0.5)

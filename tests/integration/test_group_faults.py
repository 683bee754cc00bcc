"""Groups of several ranks hurt with real signals and real failures, while requests are on their way."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tensorway.errors import DeadlineExceeded, ModelFailed, Overloaded, TensorwayError, Unavailable
from tensorway.registry.port import GROUP
from tests.contract.registry.views import together
from tests.integration.group_world import HUNG_AFTER_S, MAX_STEP_S, World, settled, world_of
from tests.integration.hurt_groups import (
    RAISE,
    RECOVERY_S,
    SLEEP,
    Report,
    pids_of,
    send_for_epoch,
    sessions,
    staged,
)
from tests.integration.test_faults import wait_gone

pytestmark = [pytest.mark.models, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

SHAPES = ((2, 1), (1, 2), (2, 2))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A group of every shape."""
    folder = tmp_path_factory.mktemp("groups")
    models = folder / "models"
    async with world_of(folder, models, *(staged(models, *shape) for shape in SHAPES)) as made:
        yield made


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


async def kill(world: World, shape: tuple[int, int], rank: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Kills a rank in the middle of a step, and checks all that must hold then."""
    before, after, ended = await hurt(world, shape, rank, number)
    assert {type(error) for error in ended if error is not None} <= {Unavailable, DeadlineExceeded}, ended
    why = await world.history.why(before["model"], before["epoch"])
    assert why.startswith(f"rank {rank} on node-1 was killed by {number.name}"), why
    registered = [row for row in await world.mesh.members(GROUP) if row.metadata["model"] == before["model"]]
    assert [int(row.metadata["epoch"]) for row in registered] == [after["epoch"]]
    refused = await send_for_epoch(after, before["epoch"])
    assert isinstance(refused, Unavailable)
    assert f"is in epoch {after['epoch']}" in refused.message
    assert await send_for_epoch(after, after["epoch"]) is None
    assert not sessions(*pids_of(before))


async def test_each_rank_killed_in_the_middle_of_a_step(world: World) -> None:
    """Of the groups of two, both at once."""
    async def kill_each(shape: tuple[int, int]) -> None:
        for rank in (0, 1):
            await kill(world, shape, rank)

    await together(kill_each((2, 1)), kill_each((1, 2)))


async def test_each_rank_of_four_killed_leaves_nothing_behind(world: World) -> None:
    before = await settled(world)
    for rank in range(4):
        await kill(world, (2, 2), rank)
    await kill(world, (2, 2), 1, signal.SIGABRT)
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


@pytest.mark.parametrize("shapes", [SHAPES[:2], SHAPES[2:]], ids=str)
async def test_each_rank_stopped_in_the_middle_of_a_step(world: World, shapes: tuple[tuple[int, int], ...]) -> None:
    """Its requests end at their deadlines or with the group, and it is the silent rank that is named, not those that wait for it. The
    groups of two are hurt at once: most of it is silence."""
    await together(*(stop_each(world, shape) for shape in shapes))


async def stop_each(world: World, shape: tuple[int, int]) -> None:
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
    # Too short a time to be tried again, which would end the next epoch, too.
    error = await world.call(model, (rank, RAISE, 0), timeout_s=3.0)
    assert isinstance(error, Unavailable | DeadlineExceeded)
    why = await world.history.why(model, before["epoch"])
    assert f"rank {rank} failed while the other shards of its stage did not" in why, why
    assert "order 2" in why
    await world.history.ready(model, before["epoch"] + 1)
    await world.answered(model)


async def test_a_step_that_is_too_long_on_a_follower_ends_the_epoch(world: World) -> None:
    model = "staged-2x1"
    before = await world.history.ready(model)
    slow = asyncio.ensure_future(world.call(model, (1, SLEEP, 60_000), timeout_s=MAX_STEP_S + 1.0))
    why = await world.history.why(model, before["epoch"])
    assert re.match(rf"rank 1 on node-1: a step has run for \d+ s, longer than max_step_s={MAX_STEP_S:.0f}", why), why
    assert isinstance(await slow, Unavailable | DeadlineExceeded)
    await world.history.ready(model, before["epoch"] + 1)
    await world.answered(model)



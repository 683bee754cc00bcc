"""Ranks that form one group over PyTorch RPC."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch
from worker_rank import RunningRank, call, launch_of, linked, running
from worker_wire import Sent, answered, as_torch, read_reply, tensor, write_batch

from tensorway.errors import Unavailable
from tensorway.tensors import DataType

_YAML = """
name: witness
engine: python
inputs: [{name: x, dtype: INT64, shape: [rows]}]
outputs: [{name: y, dtype: INT64, shape: [rows]}]
batching: {max_rows: 4}
"""
#: Every rank writes down the steps that it ran, in order.
_MODEL = """
from tensorway.model import Model

class Witness(Model):
    def load(self, context):
        self.rank = context.rank
        self.diary = context.directory.parent / f"rank-{context.rank}.txt"

    def forward(self, inputs):
        with self.diary.open("a") as diary:
            print(inputs["x"].tolist(), file=diary)
        if (inputs["x"] == 13).any():
            raise ValueError("13 is refused")
        return {"y": inputs["x"] * 10 + self.rank}
"""


def witness(folder: Path) -> Path:
    path = folder / "witness"
    path.mkdir()
    (path / "model.yaml").write_text(_YAML)
    (path / "model.py").write_text(_MODEL)
    return path


async def group(stack: AsyncExitStack, folder: Path, world_size: int) -> list[RunningRank]:
    model = witness(folder)
    return [
        await stack.enter_async_context(running(launch_of(model, folder, rank=rank, world_size=world_size, tensor=world_size)))
        for rank in range(world_size)
    ]


def sent(*values: int) -> Sent:
    return Sent([tensor("x", torch.tensor(values), DataType.INT64)])


async def test_every_rank_runs_the_same_steps_in_the_same_order(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        ranks = await group(stack, tmp_path, 3)
        started = [await rank.ready() for rank in ranks]
        assert [one.state for one in started] == ["ready"] * 3, [rank.log.read_text() for rank in ranks]
        assert [bool(one.endpoint) for one in started] == [True, False, False]
        link = await stack.enter_async_context(linked(started[0].endpoint))
        (one, guilty, two), _ = read_reply(*await call(link, write_batch([sent(1, 2), sent(13), sent(3)])))
        assert as_torch(answered(one)["y"], torch.int64).tolist() == [10, 20]
        assert as_torch(answered(two)["y"], torch.int64).tolist() == [30]
        assert "13 is refused" in str(guilty)
        diaries = [(tmp_path / f"rank-{rank}.txt").read_text().splitlines() for rank in range(3)]
        assert diaries[0] == diaries[1] == diaries[2]
        assert diaries[0][:3] == ["[0]", "[0, 0, 0, 0]", "[1, 2, 13, 3]"]


async def test_a_dead_rank_ends_the_group(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        leader, follower = await group(stack, tmp_path, 2)
        started = await leader.ready()
        await follower.ready()
        link = await stack.enter_async_context(linked(started.endpoint))
        follower.process.kill()
        await follower.exit_status()
        with pytest.raises(Unavailable, match=r"lost|broke"):
            await call(link, write_batch([sent(1)]))
        status = await leader.wait_for(lambda status: status.state == "failed")
        assert "epoch 1" in status.detail
        assert await asyncio.wait_for(leader.exit_status(), 30) == 1

"""What groups of several ranks answer: limited memory, text of all lengths, derivatives; through a whole mesh."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio

from tensorway import Explain
from tensorway.errors import DeadlineExceeded, OutOfMemory, Unavailable
from tensorway.registry.port import NODE
from tensorway.v1 import node_pb2
from tests.integration.group_world import LATE_S, LIST_GROUPS, World, channel_to, world_of
from tests.integration.hurt_groups import (
    FILL,
    SLEEP,
    ask,
    is_right,
    real,
    staged,
)

pytestmark = [pytest.mark.models, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

#: Of the model `guarded`: memory that each rank fills for each row of a step, and its limit.
ROW_MB, GUARDED_MB = 64, 800
#: What a call that cannot be answered is given, seconds.
EXPLAIN_S = 5.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A group whose memory is limited, and MiniLM whole and as a pipeline of two."""
    folder = tmp_path_factory.mktemp("served")
    models = folder / "models"
    names = [
        staged(
            models, 2, 1, "guarded", settings={"row_mb": ROW_MB, "room_mb": 4096}, memory_limit_mb=GUARDED_MB, parallel={"micro_batches": 1}
        ),
        real(models, "minilm", "whole", threads=1),
        real(models, "minilm", "pipeline", threads=1, parallel={"pipeline": 2, "micro_batches": 2, "verify": "off"}),
    ]
    # Nothing hangs here: a machine that is busy elsewhere may take its time.
    async with world_of(folder, models, *names, hung_after_s=10.0, max_step_s=60.0) as made:
        yield made


async def test_real_lack_of_memory_fails_its_request_alone(served: World) -> None:
    """The address space of these ranks is limited: torch really gets no memory."""
    model = "guarded"
    before = await served.history.ready(model)
    for rank in (1, 0):
        async with asyncio.TaskGroup() as tasks:
            others = [tasks.create_task(served.call(model)) for _ in range(3)]
            guilty = tasks.create_task(served.call(model, (rank, FILL, 1 << 14)))
        error = guilty.result()
        assert isinstance(error, OutOfMemory), error
        assert error.status.name == "RESOURCE_EXHAUSTED"
        assert f"(rank {rank})" in error.message or rank == 0
        assert [task.result() for task in others] == [None] * 3
        assert await served.call(model) is None
    assert (await served.history.ready(model))["epoch"] == before["epoch"]


async def test_a_step_that_is_predicted_not_to_fit_is_split_or_refused(served: World) -> None:
    model = "guarded"
    before = await served.history.ready(model)
    limit = before["ranks"][0]["memory_limit_bytes"]
    assert limit == GUARDED_MB << 20
    async with asyncio.TaskGroup() as tasks:
        # While one step runs, the others are joined into one that does not fit.
        slow = tasks.create_task(served.call(model, (0, SLEEP, 300)))
        await asyncio.sleep(0.05)
        joined = [tasks.create_task(served.client.infer(model, ask())) for _ in range(7)]
    assert slow.result() is None
    assert all(is_right(ask(), task.result()["y"]) for task in joined)
    assert max(task.result().timing.batch_requests for task in joined) > 3
    with pytest.raises(OutOfMemory, match=r"predicted to need \d+ MiB of memory, and \d+ MiB may be used"):
        await served.client.infer(model, ask(rows=8))
    assert await served.call(model) is None
    (node,) = await served.mesh.members(NODE)
    async with channel_to(node.endpoint) as channel:
        reply = await channel.unary(LIST_GROUPS, b"", 10.0)
    (group,) = [one for one in node_pb2.ListGroupsResponse.FromString(reply.response).groups if one.model == model]
    assert [rank.rank for rank in group.ranks] == [0, 1]
    assert all(0 < rank.memory_bytes < rank.memory_limit_bytes == limit for rank in group.ranks)
    assert all(0 < rank.weights_bytes < 1 << 20 for rank in group.ranks)
    assert group.epoch == before["epoch"]


async def test_text_of_all_lengths_through_a_pipeline_equals_the_whole_model(served: World) -> None:
    """A batch of four goes through the pipeline as two micro-batches of two: what the whole model makes of two at once, bit by bit. Many
    callers at once are joined otherwise, and the last bits may differ."""
    texts = ["word " * (1 + number * 5 % 37) + str(number) for number in range(24)]
    long = "word " * 50
    for start in range(0, 12, 2):
        # The longest text of both halves is the same: so is their padding.
        halves = [[texts[start], long], [texts[start + 1], long]]
        whole = [(await served.client.infer("whole", {"text": half}))["embedding"] for half in halves]
        cut = (await served.client.infer("pipeline", {"text": halves[0] + halves[1]}))["embedding"]
        np.testing.assert_array_equal(cut, np.concatenate(whole))
    whole_all = (await served.client.infer("whole", {"text": texts}))["embedding"]
    results = await asyncio.gather(*(
        served.client.infer("pipeline", {"text": texts[number % 21 : number % 21 + 1 + number % 3]}) for number in range(120)
    ))
    assert max(result.timing.batch_requests for result in results) > 1
    for number, result in enumerate(results):
        first = number % 21
        np.testing.assert_allclose(result["embedding"], whole_all[first : first + 1 + number % 3], atol=2e-6)


async def test_explaining_across_ranks_equals_explaining_in_one(served: World) -> None:
    texts = ["the cat sat on the mat", "shares fell", "a man plays the guitar in the rain tonight"]
    wishes = [
        Explain(method=method, output="embedding", index=(index,), num_points=6)
        for index, method in enumerate(("saliency", "input_x_gradient", "integrated_gradients"))
    ]
    wanted = {
        (text, wish): await served.client.explain("whole", {"text": [text]}, wish) for text in texts for wish in wishes
    }
    embeddings = {text: (await served.client.infer("whole", {"text": [text]}))["embedding"] for text in texts}

    async def explained(text: str, wish: Explain) -> None:
        found = await served.client.explain("pipeline", {"text": [text]}, wish)
        expected = wanted[text, wish]
        assert found["attribution"].shape == expected["attribution"].shape
        np.testing.assert_allclose(found["attribution"], expected["attribution"], atol=1e-6)
        np.testing.assert_allclose(found["score"], expected["score"], atol=1e-6)

    async def inferred(text: str) -> None:
        found = (await served.client.infer("pipeline", {"text": [text]}))["embedding"]
        np.testing.assert_allclose(found, embeddings[text], atol=2e-6)

    async with asyncio.TaskGroup() as tasks:
        for (text, wish) in wanted:
            tasks.create_task(explained(text, wish))
            tasks.create_task(inferred(text))


async def test_a_rank_killed_while_it_explains_fails_the_call_and_comes_back(served: World) -> None:
    before = await served.history.ready("pipeline")
    wish = Explain(method="integrated_gradients", output="embedding", index=(0,), num_points=1000)
    sent = {"text": ["a long way " * 20]}
    calls = [asyncio.ensure_future(served.client.explain("pipeline", sent, wish, timeout_s=EXPLAIN_S)) for _ in range(2)]
    await asyncio.sleep(0.5)
    assert not any(call.done() for call in calls)
    began_s = time.monotonic()
    os.kill(before["ranks"][1]["pid"], signal.SIGKILL)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert time.monotonic() - began_s < EXPLAIN_S + LATE_S
    assert all(not isinstance(one, BaseException) or isinstance(one, Unavailable | DeadlineExceeded) for one in outcomes), outcomes
    assert (await served.history.why("pipeline", before["epoch"])).startswith("rank 1 on node-1 was killed by SIGKILL")
    await served.history.ready("pipeline", before["epoch"] + 1)
    again = await served.client.explain("pipeline", {"text": ["once more"]}, Explain(method="saliency", output="embedding", index=(0,)))
    assert np.isfinite(again["attribution"]).all()



"""Streams that outlive what happens to groups, orchestrators, gateways and connections: not a token is lost, repeated or different."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tensorway.errors import Cancelled, InvalidRequest, NotFound, TensorwayError
from tensorway.registry.port import GATEWAY, ORCHESTRATOR
from tensorway.v1 import inference_pb2 as pb
from tests.integration.conftest import running_mesh
from tests.integration.generate_world import PROMPT, Talk, Told, ask, error_of, resume, small, talk_of
from tests.integration.test_faults import wait_gone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.asyncio(loop_scope="module")]

#: Ways to draw: each must repeat itself whatever happens.
DRAWS: dict[str, dict[str, Any]] = {"greedy": {}, "drawn": {"temperature": 0.8, "seed": 11}}
NUM_TOKENS = 40
EVERY_KILL = os.environ.get("TENSORWAY_KILL_ALL")
#: Tokens that a client has when the group dies.
KILLS = dict.fromkeys(DRAWS, range(NUM_TOKENS)) if EVERY_KILL else {"greedy": (0, 1, 7, 20, 39), "drawn": (0, 20)}
#: Times that a signal may come too late to hit its stream, on a machine that does other things.
TRIES = 8


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def talk(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Talk]:
    """Three replicas of a model, the same model with one group, and cut into two stages; two of every service that takes requests."""
    folder = tmp_path_factory.mktemp("talk")
    models = folder / "models"
    names = (small(models, "threefold", replicas=3), small(models, "lone"), small(models, "cut", 2))
    async with running_mesh(folder, *names, models_dir=models, orchestrators=2, spread_wait_s=0.05) as mesh, talk_of(mesh) as made:
        await mesh.start("gateway-2", "gateway")
        await mesh.wait_members(GATEWAY, 2)
        yield made


async def other_gateway(talk: Talk) -> str:
    (endpoint,) = [row.endpoint for row in await talk.mesh.members(GATEWAY) if row.endpoint != talk.mesh.endpoint]
    return endpoint


async def test_the_model_says_the_same_in_every_shape(talk: Talk) -> None:
    for more in DRAWS.values():
        first, *others = [await talk.answer(ask(model, **more)) for model in ("lone", "threefold", "cut")]
        assert len(first.ids()) == NUM_TOKENS
        assert len(set(first.ids())) > NUM_TOKENS // 4
        assert first.text().split() == [f"w{token}" for token in first.ids() if token != 1]
        for told in others:
            told.is_same(first)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", DRAWS)
async def test_a_stream_outlives_its_group(talk: Talk, how: str) -> None:
    """The leader is killed after each of several tokens; a group that has the prompt is where the same prompt goes again."""
    whole = await talk.answer(ask("threefold", **DRAWS[how]))
    target = whole.finished().group
    for count in KILLS[how]:
        for _ in range(TRIES):
            await talk.serving("threefold", 2)
            async with talk.call(ask("threefold", **DRAWS[how])) as call:
                await call.tokens(count)
                await talk.kill_leader(target)
                told = await call.rest()
            told.is_same(whole)
            target = told.finished().group
            # Its last tokens may have been on their way already.
            if told.finished().num_attempts > 1 or count > NUM_TOKENS // 2:
                break
        else:
            raise AssertionError(f"no signal came before the end, after {count} tokens: {told.finished()}")


async def test_several_choices_outlive_their_groups(talk: Talk) -> None:
    """Each has its prompt once, and a log-probability for each token."""
    request = ask("threefold", num_choices=3, temperature=0.8, seed=5, echo=True, num_top_logprobs=2)
    whole = await talk.answer(request)
    assert len({tuple(whole.ids(choice)) for choice in range(3)}) == 3
    target = whole.finished(0).group
    for _ in range(TRIES):
        await talk.serving("threefold", 3)
        async with talk.call(request) as call:
            await call.tokens(8)
            await talk.kill_leader(target)
            told = await call.rest()
        told.is_same(whole, 3)
        for choice in range(3):
            prompts = [message.delta for message in told.messages if message.delta.is_prompt and message.delta.choice == choice]
            assert [tuple(prompt.token_ids) for prompt in prompts] == [PROMPT]
            assert [len(delta.logprobs) for delta in told.deltas(choice)] == [len(delta.token_ids) for delta in told.deltas(choice)]
        target = told.finished(0).group
        if any(told.finished(choice).num_attempts > 1 for choice in range(3)):
            return
    raise AssertionError("no signal came before the end")


@pytest.mark.parametrize("model", ["lone", "cut"])
async def test_the_only_group_dies_and_its_next_epoch_goes_on(talk: Talk, model: str) -> None:
    """Of the one in two stages, it is the second rank that dies."""
    whole = await talk.answer(ask(model, max_tokens=120))
    for _ in range(TRIES):
        group = await talk.until_group(model, lambda one: one.endpoint != "" and len(one.pids) == (2 if model == "cut" else 1))
        async with talk.call(ask(model, max_tokens=120)) as call:
            await call.tokens(10)
            os.kill(group.pids[-1], signal.SIGKILL)
            await wait_gone(group.pids[-1])
            told = await call.rest()
        told.is_same(whole)
        if told.finished().num_attempts > 1:
            assert told.finished().group == f"{group.id}#{group.epoch + 1}"
            return
        await talk.until_group(model, lambda one, last=group.epoch: one.epoch > last and one.endpoint != "")  # type: ignore[misc]
    raise AssertionError("no signal came before the end")


async def test_a_stream_is_resumed_at_another_gateway(talk: Talk) -> None:
    whole = await talk.answer(ask("threefold", max_tokens=120))
    there = await other_gateway(talk)
    call = talk.call(ask("threefold", max_tokens=120))
    await call.tokens(10)
    await talk.cut(talk.mesh.endpoint)
    told = await talk.answer(resume(call.told), there, Told(call.told.messages))
    told.is_same(whole)
    # From the middle and from the end, as long as it is kept: word for word.
    for first in (5, len(told.messages) - 1, len(told.messages)):
        again = await talk.answer(pb.GenerateRequest(resume=pb.Resume(stream_id=told.started.stream_id, next_sequence=first)))
        assert again.messages == told.messages[first:]


async def test_a_second_reader_takes_a_stream_over(talk: Talk) -> None:
    whole = await talk.answer(ask("threefold", max_tokens=120))
    async with talk.call(ask("threefold", max_tokens=120)) as first:
        await first.tokens(4)
        seen = Told(list(first.told.messages))
        second = talk.call(resume(seen), await other_gateway(talk), seen)
        told = await second.rest()
        told.is_same(whole)
        error = await error_of(first)
        # Unless all was said to the first before the second came.
        assert isinstance(error, Cancelled) or first.told.messages == told.messages


async def test_what_cannot_be_resumed_is_refused(talk: Talk) -> None:
    told = await talk.answer(ask("lone", max_tokens=3))
    known = told.started.stream_id
    for stream_id, first, kind in (("0" * 32, 0, NotFound), (known, 1000, InvalidRequest), ("", 0, TensorwayError)):
        request = pb.GenerateRequest(resume=pb.Resume(stream_id=stream_id, next_sequence=first))
        async with talk.call(request) as call:
            assert isinstance(await error_of(call), kind)


async def test_a_stream_outlives_its_orchestrator(talk: Talk) -> None:
    """Two choices with their prompts, drawn by a seed that the lost orchestrator chose."""
    request = ask("threefold", max_tokens=120, num_choices=2, temperature=0.9, echo=True)
    for _ in range(TRIES):
        before = await talk.measure(ORCHESTRATOR, "tensorway_orchestrator_tokens_total", "threefold")
        (await talk.answer(ask("threefold", max_tokens=3))).finished()
        after = await talk.measure(ORCHESTRATOR, "tensorway_orchestrator_tokens_total", "threefold")
        (holder,) = [name for name, count in after.items() if count > before[name]]
        async with talk.call(request) as call:
            await call.tokens(10)
            victim = talk.mesh.processes.members[holder]
            victim.process.kill()
            await victim.process.wait()
            told = await call.rest()
        await talk.mesh.start(holder, "orchestrator")
        await talk.mesh.wait_members(ORCHESTRATOR, 2)
        seeded = pb.GenerateRequest()
        seeded.CopyFrom(request)
        seeded.sampling.seed = told.started.seed
        told.is_same(await talk.answer(seeded), 2)
        assert sum(message.delta.is_prompt for message in told.messages) == 2
        if told.finished().num_attempts > 1:
            return
    raise AssertionError("no signal came before the end")

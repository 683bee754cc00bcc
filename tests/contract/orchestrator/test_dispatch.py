"""Batching, retry, cancel, deadline and limits of the orchestrator over real links."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tensorway.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelFailed,
    NotFound,
    Overloaded,
    TensorwayError,
    Unavailable,
)
from tensorway.signature import Batching
from tensorway.transport import AsyncChannel
from tensorway.v1 import inference_pb2
from tests.contract.orchestrator.conftest import ECHO, Batch, Bench, orchestrator_bench


def hold(_: Batch) -> None:
    """Answers nothing."""


async def test_one_request_goes_at_once_and_comes_back_whole(bench: Bench) -> None:
    await bench.add_leader("g")
    assert await bench.infer("r", b"hello") == b"hello"
    timing = bench.last_reply.timing
    assert (timing.batch_rows, timing.batch_requests, timing.num_attempts, timing.is_first_in_batch) == (1, 1, 1, True)
    assert timing.group == "g#1"
    assert bench.last_reply.revision == ECHO.revision


async def test_what_waits_becomes_the_next_batch_by_urgency(bench: Bench) -> None:
    leader = await bench.add_leader("g", on_batch=hold)
    calls = [asyncio.ensure_future(bench.infer("first"))]
    await leader.wait_batches(1)
    calls.append(asyncio.ensure_future(bench.infer("second")))
    await leader.wait_batches(2)  # one runs, one waits at the leader
    for number in range(6):
        calls.append(asyncio.ensure_future(bench.infer(f"r{number}", priority=number % 2, timeout_s=30 - number)))
    while bench.dispatcher.lane("echo", "").queue.num_requests < 6:
        await asyncio.sleep(0.005)
    assert len(leader.batches) == 2
    leader.on_batch = lambda batch: batch.echo()
    for batch in tuple(leader.batches):
        batch.echo()
    await asyncio.gather(*calls)
    assert leader.batches[2].ids == ["r5", "r3", "r1", "r4", "r2", "r0"]


async def test_answers_go_to_their_own_requests_whatever_the_sizes(bench: Bench) -> None:
    await bench.add_leader("g")
    contents = [bytes([number]) * (number * 37 % 2000) for number in range(120)]
    answers = await asyncio.gather(*(bench.infer(str(number), content, timeout_s=30) for number, content in enumerate(contents)))
    assert answers == contents


async def test_one_bad_request_fails_alone(bench: Bench) -> None:
    gate = await bench.add_leader("g", on_batch=hold)
    opener = asyncio.ensure_future(bench.infer("opener"))
    await gate.wait_batches(1)
    second = asyncio.ensure_future(bench.infer("second"))
    await gate.wait_batches(2)
    calls = [asyncio.ensure_future(bench.infer(name)) for name in ("good", "bad", "fine")]
    while bench.dispatcher.lane("echo", "").queue.num_requests < 3:
        await asyncio.sleep(0.005)
    gate.on_batch = lambda batch: batch.echo(failing={"bad": ModelFailed("ValueError: not today")})
    for batch in tuple(gate.batches):
        batch.echo()
    outcomes = await asyncio.gather(opener, second, *calls, return_exceptions=True)
    assert outcomes[:3] == [b"abc", b"abc", b"abc"]
    assert outcomes[4] == b"abc"
    assert isinstance(outcomes[3], ModelFailed)
    assert "not today" in str(outcomes[3])


async def test_a_lost_group_means_another_attempt_elsewhere(bench: Bench) -> None:
    dying = await bench.add_leader("dying", on_batch=hold)
    call = asyncio.ensure_future(bench.infer("r", b"xyz"))
    await dying.wait_batches(1)
    healthy = await bench.add_leader("healthy")
    await dying.server.stop(0.0)
    assert await call == b"xyz"
    assert healthy.batches[0].ids == ["r"]
    assert bench.last_reply.timing.num_attempts == 2


async def test_the_same_group_with_a_new_epoch_takes_over(bench: Bench) -> None:
    old = await bench.add_leader("g", epoch=1, on_batch=hold)
    call = asyncio.ensure_future(bench.infer("r"))
    await old.wait_batches(1)
    await old.server.stop(0.0)
    assert old.lease is not None
    await old.lease.release()
    new = await bench.add_leader("g", epoch=2)
    assert await call == b"abc"
    assert new.batches[0].head.epoch == 2


async def test_no_group_for_long_is_unavailable_and_says_where_to_look(bench: Bench) -> None:
    with pytest.raises(Unavailable, match="tensorway models"):
        await bench.infer("r")
    with pytest.raises(Unavailable) as refused:  # now at once
        await bench.infer("r")
    assert refused.value.retry_after_s > 0


async def test_the_models_own_error_is_never_retried(bench: Bench) -> None:
    leader = await bench.add_leader("g")
    leader.on_batch = lambda batch: batch.echo(failing={"r": ModelFailed("boom")})
    with pytest.raises(ModelFailed, match="boom"):
        await bench.infer("r")
    assert len(leader.batches) == 1


async def test_a_cancelled_request_costs_nothing_once_it_waits_and_reaches_the_leader_once_it_runs(bench: Bench) -> None:
    leader = await bench.add_leader("g", on_batch=hold)
    running = asyncio.ensure_future(bench.infer("running"))
    await leader.wait_batches(1)
    second = asyncio.ensure_future(bench.infer("second"))
    await leader.wait_batches(2)
    waiting = asyncio.ensure_future(bench.infer("waiting"))
    lane = bench.dispatcher.lane("echo", "")
    while lane.queue.num_requests < 1:
        await asyncio.sleep(0.005)
    waiting.cancel()
    while lane.queue.num_requests:
        await asyncio.sleep(0.005)
    running.cancel()
    async with asyncio.timeout(5):
        while not leader.cancelled:
            await asyncio.sleep(0.005)
    assert leader.cancelled == [leader.batches[0].head.batch_id]
    leader.batches[1].echo()
    assert await second == b"abc"
    assert lane.num_open == 0


async def test_the_deadline_ends_a_request_wherever_it_is(bench: Bench) -> None:
    leader = await bench.add_leader("g", on_batch=hold)
    outcomes = await asyncio.gather(*(bench.infer(str(number), timeout_s=0.2) for number in range(3)), return_exceptions=True)
    assert all(isinstance(outcome, DeadlineExceeded) for outcome in outcomes)
    async with asyncio.timeout(5):
        while bench.dispatcher.num_open:
            await asyncio.sleep(0.005)
    leader.on_batch = lambda batch: batch.echo()
    assert await bench.infer("after") == b"abc"


async def test_a_leader_that_is_full_is_asked_again_and_that_is_no_attempt(bench: Bench) -> None:
    refusals = 0

    def refuse_then_echo(batch: Batch) -> None:
        nonlocal refusals
        refusals += 1
        if refusals <= 5:
            batch.exchange.fail(Overloaded("4 batches run or wait at this group", retry_after_s=0.01))
        else:
            batch.echo()

    await bench.add_leader("g", on_batch=refuse_then_echo)
    assert await bench.infer("r") == b"abc"
    assert bench.last_reply.timing.num_attempts == 1
    assert refusals == 6


async def test_a_full_queue_says_so_and_when_to_come_back(tmp_path: Path) -> None:
    async with orchestrator_bench(tmp_path, replace(ECHO, batching=Batching(max_rows=8, max_queue_rows=64))) as bench:
        await overload(bench)


async def overload(bench: Bench) -> None:
    leader = await bench.add_leader("g", on_batch=hold)
    calls = [asyncio.ensure_future(bench.infer(str(number), b"x" * 8, rows=8)) for number in range(12)]
    outcomes: list[TensorwayError] = []
    async with asyncio.timeout(5):
        while not outcomes:
            await asyncio.sleep(0.005)
            outcomes = [error for call in calls if call.done() and isinstance(error := call.exception(), TensorwayError)]
    assert all(isinstance(error, Overloaded) and error.retry_after_s > 0 for error in outcomes)
    assert "64 of 64 rows" in outcomes[0].message
    leader.on_batch = lambda batch: batch.echo()
    for batch in tuple(leader.batches):
        batch.echo()
    answered = [outcome for outcome in await asyncio.gather(*calls, return_exceptions=True) if outcome == b"x" * 8]
    assert len(answered) == 12 - len(outcomes)


async def test_an_oversize_request_is_refused_by_the_rule(bench: Bench) -> None:
    leader = await bench.add_leader("g")
    with pytest.raises(InvalidRequest, match="at most 8"):
        await bench.infer("big", b"x" * 9, rows=9)
    assert not leader.batches


async def test_or_runs_alone_where_the_author_allows_it(tmp_path: Path) -> None:
    spec = replace(ECHO, batching=Batching(max_rows=8, oversize="alone"))
    async with orchestrator_bench(tmp_path, spec) as bench:
        leader = await bench.add_leader("g")
        assert await bench.infer("big", b"x" * 9, rows=9) == b"x" * 9
        assert leader.batches[0].ids == ["big"]


async def test_unknown_models_and_hostile_heads(bench: Bench) -> None:
    with pytest.raises(NotFound, match="echo"):
        await bench.infer("r", model="nothing")
    from tensorway.deadline import Deadline

    with pytest.raises(InvalidRequest, match="RequestHead"):
        await bench.link.call(b"\xff\xff\xff", (), Deadline.after(5.0))


async def test_the_unary_api_of_the_hop_itself(bench: Bench) -> None:
    await bench.add_leader("g")
    channel = AsyncChannel(bench.endpoint)
    request = inference_pb2.InferRequest(model="echo", request_id="q")
    request.inputs.add(name="input", dtype=2, shape=[1, 3], data=b"abc")
    reply = await channel.unary("/tensorway.v1.InferenceService/Infer", request.SerializeToString(), 10.0)
    response = inference_pb2.InferResponse.FromString(reply.response)
    assert (response.outputs[0].data, response.revision, response.request_id) == (b"abc", ECHO.revision, "q")
    request.inputs[0].data = b"ab"
    with pytest.raises(InvalidRequest, match=r"inputs\[0\]"):
        await channel.unary("/tensorway.v1.InferenceService/Infer", request.SerializeToString(), 10.0)
    await channel.close()


async def test_a_broken_gateway_link_withdraws_its_requests(bench: Bench) -> None:
    leader = await bench.add_leader("g", on_batch=hold)
    call = asyncio.ensure_future(bench.infer("r"))
    await leader.wait_batches(1)
    await bench.registry.delete("desired/echo")  # unrelated news must not disturb it
    call.cancel()
    async with asyncio.timeout(5):
        # The word of it is on its way when the request is closed here.
        while bench.dispatcher.num_open or not leader.cancelled:
            await asyncio.sleep(0.005)

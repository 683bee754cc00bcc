"""Hedges, stuck groups, deadly requests, keys and fallbacks of the orchestrator, over real links."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tensorway.deadline import Deadline
from tensorway.errors import DeadlineExceeded, InvalidRequest, ModelFailed, NotFound, Unavailable
from tensorway.resilience import Fallback, Hedging
from tensorway.revisions import revision_key
from tensorway.signature import Batching, Signature, TensorSpec
from tensorway.tensors import DataType
from tensorway.v1 import link_pb2
from tests.contract.orchestrator.conftest import ECHO, Batch, Bench, Leader, orchestrator_bench

MAIN = replace(ECHO, model="main", revision="cd" * 32, fallback=Fallback("echo"))


def hold(_: Batch) -> None:
    """Answers nothing."""


def echo(batch: Batch) -> None:
    batch.echo()


async def warm(bench: Bench, number: int) -> None:
    """Measures steps until predictions count."""
    for name in range(number):
        await bench.infer(f"warm-{name}")


def holds_one_of(leaders: tuple[Leader, ...]) -> list[Batch]:
    """Whichever of them is sent the next batch keeps it, and says so in the list; all later ones are answered."""
    held: list[Batch] = []

    def keep(batch: Batch) -> None:
        if held:
            batch.echo()
        else:
            held.append(batch)

    for leader in leaders:
        leader.on_batch = keep
    return held


async def stop_later(leader: Leader) -> None:
    await asyncio.sleep(0.3)
    await leader.server.stop(0.0)


async def test_a_late_request_is_hedged_and_the_loser_is_cancelled(tmp_path: Path) -> None:
    spec = replace(ECHO, hedging=Hedging(quantile=0.5, min_delay_ms=20.0, max_share=1.0))
    async with orchestrator_bench(tmp_path, spec) as bench:
        leaders = await bench.add_leader("a"), await bench.add_leader("b")
        await warm(bench, 128)
        before = bench.count("hedges")
        held = holds_one_of(leaders)
        assert await bench.infer("late", b"xyz") == b"xyz"
        timing = bench.last_reply.timing
        assert (timing.num_attempts, timing.num_hedges) == (2, 1)
        assert bench.count("hedges") == before + 1
        assert bench.count("hedge_wins") >= 1
        async with asyncio.timeout(5):
            while not any(held[0].head.batch_id in leader.cancelled for leader in leaders):
                await asyncio.sleep(0.005)


async def test_hedges_are_no_more_than_their_share(tmp_path: Path) -> None:
    spec = replace(ECHO, hedging=Hedging(quantile=0.5, min_delay_ms=1.0, max_share=0.005))
    async with orchestrator_bench(tmp_path, spec) as bench:
        leaders = await bench.add_leader("a"), await bench.add_leader("b")
        await warm(bench, 128)  # less than one hedge's worth
        held = holds_one_of(leaders)
        call = asyncio.ensure_future(bench.infer("late"))
        async with asyncio.timeout(5):
            while not held:
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)  # many times the delay
        assert not call.done()
        assert bench.count("hedges") == 0
        held[0].echo()
        assert await call == b"abc"


async def test_what_is_stuck_is_answered_by_another_group(bench: Bench) -> None:
    leaders = await bench.add_leader("a"), await bench.add_leader("b")
    await warm(bench, 40)
    held = holds_one_of(leaders)
    assert await bench.infer("r", b"xyz", timeout_s=8) == b"xyz"
    assert held[0].ids == ["r"]
    assert bench.count("stuck_batches") == 1
    assert bench.last_reply.timing.num_attempts == 2


async def test_a_deadly_request_fails_alone_after_two_groups(bench: Bench) -> None:
    """Three groups; the poison arrives in one batch with others, and kills whoever runs it."""
    leaders = {name: await bench.add_leader(name, on_batch=hold) for name in ("a", "b", "c")}
    dead: list[str] = []
    stopping: list[asyncio.Task[None]] = []

    def mortal(name: str) -> None:
        def take(batch: Batch) -> None:
            if name in dead:
                return
            if "poison" in batch.ids:
                dead.append(name)
                # The groups are of one node: only deaths that are some way apart are the request's.
                stopping.append(asyncio.ensure_future(stop_later(leaders[name])))
            else:
                batch.echo()

        leaders[name].on_batch = take

    # All are kept busy, so that what follows gathers into one batch.
    openers = [asyncio.ensure_future(bench.infer(f"opener-{number}", b"first")) for number in range(6)]
    async with asyncio.timeout(5):
        while sum(len(leader.batches) for leader in leaders.values()) < 6:
            await asyncio.sleep(0.005)
    names = ["i0", "i1", "poison", "i2", "i3"]
    calls = [asyncio.ensure_future(bench.infer(name, name.encode().ljust(8), timeout_s=20)) for name in names]
    while bench.dispatcher.lane("echo", "").queue.num_requests < len(names):
        await asyncio.sleep(0.005)
    for name in leaders:
        mortal(name)
    for leader in leaders.values():
        for batch in tuple(leader.batches):
            batch.echo()
    assert await asyncio.gather(*openers) == [b"first"] * 6
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [outcome for name, outcome in zip(names, outcomes, strict=True) if name != "poison"] == [
        name.encode().ljust(8) for name in names if name != "poison"
    ]
    failed = outcomes[2]
    assert isinstance(failed, ModelFailed)
    assert "fingerprint" in str(failed)
    assert len(dead) == 2
    (survivor,) = leaders.keys() - set(dead)
    # The same content again is refused without an attempt; anything else is served.
    num_batches = len(leaders[survivor].batches)
    with pytest.raises(ModelFailed, match="quarantine"):
        await bench.infer("again", b"poison".ljust(8))
    assert len(leaders[survivor].batches) == num_batches
    assert await bench.infer("other", b"wholesome") == b"wholesome"
    await asyncio.gather(*stopping)


async def test_groups_of_one_node_that_die_together_are_not_blamed_on_a_request(bench: Bench) -> None:
    """As when a node is killed with all its groups: the one that ran the request, and a moment later the one that it went to next."""
    leaders = {name: await bench.add_leader(name, on_batch=hold) for name in ("a", "b")}
    stopping: list[asyncio.Task[None]] = []

    def die(name: str) -> None:
        leaders[name].on_batch = lambda _: stopping.append(asyncio.ensure_future(leaders[name].server.stop(0.0)))

    for name in leaders:
        die(name)
    call = asyncio.ensure_future(bench.infer("innocent", b"xyz", timeout_s=20))
    async with asyncio.timeout(10):
        while len(stopping) < 2:
            await asyncio.sleep(0.005)
    await bench.add_leader("c")
    assert await call == b"xyz"
    await asyncio.gather(*stopping)


async def test_nothing_is_sent_again_once_the_revision_is_withdrawn(bench: Bench) -> None:
    leader = await bench.add_leader("g", on_batch=hold)
    call = asyncio.ensure_future(bench.infer("r", timeout_s=20))
    await leader.wait_batches(1)
    await bench.registry.delete(revision_key(ECHO.model, ECHO.revision))
    async with asyncio.timeout(10):
        while bench.dispatcher.knows("echo"):
            await asyncio.sleep(0.005)
    leader.batches[0].exchange.fail(Unavailable("not now"))
    with pytest.raises(Unavailable, match="withdrawn"):
        await call
    assert len(leader.batches) == 1


async def test_a_lost_request_waits_for_a_full_group_rather_than_for_the_one_that_lost_it(bench: Bench) -> None:
    refusing = await bench.add_leader("refusing", on_batch=lambda batch: batch.exchange.fail(Unavailable("not now")))
    full = await bench.add_leader("full", on_batch=hold)
    calls = [asyncio.ensure_future(bench.infer(f"r{number}", timeout_s=8)) for number in range(12)]
    async with asyncio.timeout(5):
        while len(full.batches) < 2 or bench.dispatcher.lane("echo", "").queue.num_requests == 0:
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.2)  # longer than any pause between two attempts
    seen = [name for batch in refusing.batches for name in batch.ids]
    assert len(seen) == len(set(seen))
    full.on_batch = echo
    for batch in tuple(full.batches):
        batch.echo()
    assert await asyncio.gather(*calls) == [b"abc"] * 12


async def test_a_request_that_would_be_late_does_not_leave(bench: Bench) -> None:
    leader = await bench.add_leader("g", on_batch=lambda batch: batch.echo(step_us=400_000))
    await warm(bench, 12)
    leader.on_batch = hold
    first = asyncio.ensure_future(bench.infer("first"))
    await leader.wait_batches(13)
    # The running step is predicted to take 0.4 s, its own another 0.4 s.
    with pytest.raises(DeadlineExceeded, match="would answer in"):
        await bench.infer("late", timeout_s=0.3)
    assert len(leader.batches) == 13
    leader.batches[-1].echo()
    assert await first == b"abc"


async def test_high_priority_is_not_refused_for_what_waits_behind_it(tmp_path: Path) -> None:
    spec = replace(ECHO, batching=Batching(max_rows=1, max_queue_rows=200))
    async with orchestrator_bench(tmp_path, spec) as bench:
        leader = await bench.add_leader("g", on_batch=lambda batch: batch.echo(step_us=100_000))
        await warm(bench, 12)
        leader.on_batch = hold
        calls = [asyncio.ensure_future(bench.infer(f"low-{number}", timeout_s=20)) for number in range(30)]
        while bench.dispatcher.lane("echo", "").queue.num_requests < 28:
            await asyncio.sleep(0.005)
        with pytest.raises(DeadlineExceeded, match="would answer in") as refused:
            await bench.infer("low", timeout_s=1.0)
        assert refused.value.retry_after_s > 0
        high = asyncio.ensure_future(bench.infer("high", timeout_s=1.0, priority=10))
        while bench.dispatcher.lane("echo", "").queue.rows_ahead(10) == 0:
            await asyncio.sleep(0.005)
        leader.on_batch = echo
        for batch in tuple(leader.batches):
            batch.echo()
        assert await high == b"abc"
        await asyncio.gather(*calls)
        assert next(batch.ids for batch in leader.batches[14:]) == ["high"]


async def test_one_key_is_one_run(bench: Bench) -> None:
    leader = await bench.add_leader("g", on_batch=hold)
    calls = [asyncio.ensure_future(bench.infer(f"try-{number}", b"same", key="k")) for number in range(3)]
    await leader.wait_batches(1)
    while bench.count("idempotent_repeats") < 2:
        await asyncio.sleep(0.005)
    leader.batches[0].echo()
    assert await asyncio.gather(*calls) == [b"same"] * 3
    assert await bench.infer("later", b"same", key="k") == b"same"
    assert len(leader.batches) == 1
    with pytest.raises(InvalidRequest, match="another request"):
        await bench.infer("other", b"else", key="k")
    leader.on_batch = echo
    assert await bench.infer("other", b"else", key="k2") == b"else"
    assert len(leader.batches) == 2


async def test_a_run_outlives_whoever_asked_for_it_and_its_answer_is_kept(bench: Bench) -> None:
    leader = await bench.add_leader("g", on_batch=hold)
    head = link_pb2.RequestHead(request_id="r", model="echo", rows=1, idempotency_key="k")
    head.inputs.add(name="input", dtype=2, shape=[1, 3], num_bytes=3)
    sink_id = bench.link.send(head.SerializeToString(), (b"abc",), Deadline.after(30), Nobody())
    await leader.wait_batches(1)
    bench.link.cancel(sink_id)  # the caller has gone; the deadline that it sent has not passed
    assert leader.cancelled == []
    again = asyncio.ensure_future(bench.infer("again", b"abc", key="k"))
    while bench.count("idempotent_repeats") < 1:
        await asyncio.sleep(0.005)
    assert leader.cancelled == []
    leader.batches[0].echo()
    assert await again == b"abc"
    assert len(leader.batches) == 1


class Nobody:
    """A sink that hears nothing."""

    def on_reply(self, head: bytes, payload: object) -> None:
        raise AssertionError("it was cancelled")

    def on_error(self, error: Exception) -> None:
        raise AssertionError("it was cancelled")


async def test_what_another_attempt_may_cure_is_not_kept_under_its_key(bench: Bench) -> None:
    with pytest.raises(Unavailable):
        await bench.infer("r", key="k")
    leader = await bench.add_leader("g")
    assert await bench.infer("r", key="k") == b"abc"
    leader.on_batch = lambda batch: batch.echo(failing={"bad": ModelFailed("boom")})
    for _ in range(2):
        with pytest.raises(ModelFailed, match="boom"):
            await bench.infer("bad", b"xyz", key="bad")
    assert len(leader.batches) == 2


async def test_an_unknown_model_leaves_no_key_behind(bench: Bench) -> None:
    for _ in range(2):
        with pytest.raises(NotFound):
            await bench.infer("r", model="nobody", key="k")


async def test_who_asks_later_with_a_longer_deadline_is_not_failed_by_the_first_ones(bench: Bench) -> None:
    leader = await bench.add_leader("g", on_batch=hold)
    short = asyncio.ensure_future(bench.infer("short", key="k", timeout_s=1.5))
    await leader.wait_batches(1)
    long = asyncio.ensure_future(bench.infer("long", key="k", timeout_s=8))
    with pytest.raises(DeadlineExceeded):
        await short
    await leader.wait_batches(2)
    leader.batches[1].echo()
    assert await long == b"abc"


async def test_the_first_one_may_leave_before_its_deadline(bench: Bench) -> None:
    """Then who asked later is the first that is left, and still has time."""
    leader = await bench.add_leader("g", on_batch=hold)
    short = asyncio.ensure_future(bench.infer("short", key="k", timeout_s=1.5))
    await leader.wait_batches(1)
    long = asyncio.ensure_future(bench.infer("long", key="k", timeout_s=8))
    while bench.count("idempotent_repeats") < 1:
        await asyncio.sleep(0.005)
    short.cancel()
    async with asyncio.timeout(6):
        await leader.wait_batches(2)
    leader.batches[1].echo()
    assert await long == b"abc"


async def test_the_fallback_answers_while_no_group_lives_and_says_so(tmp_path: Path) -> None:
    async with orchestrator_bench(tmp_path, MAIN, ECHO) as bench:
        await bench.add_leader("e")
        assert await bench.infer("r", b"xyz", model="main") == b"xyz"
        assert (bench.last_reply.model, bench.last_reply.revision) == ("echo", ECHO.revision)
        assert bench.count("fallbacks", "main") == 1
        await bench.add_leader("m", spec=MAIN)
        assert await bench.infer("r", b"xyz", model="main") == b"xyz"
        assert (bench.last_reply.model, bench.last_reply.revision) == ("", MAIN.revision)


async def test_the_fallback_answers_what_the_queue_has_no_room_for_but_no_error_of_the_model(tmp_path: Path) -> None:
    small = replace(MAIN, batching=Batching(max_rows=1, max_queue_rows=1))
    async with orchestrator_bench(tmp_path, small, ECHO) as bench:
        await bench.add_leader("e")
        main = await bench.add_leader("m", spec=small, on_batch=hold)
        waiting = [asyncio.ensure_future(bench.infer(f"w{number}", model="main")) for number in range(2)]
        await main.wait_batches(2)
        waiting.append(asyncio.ensure_future(bench.infer("w2", model="main")))
        while bench.dispatcher.lane("main", "").queue.num_requests < 1:
            await asyncio.sleep(0.005)
        assert await bench.infer("over", b"xyz", model="main") == b"xyz"
        assert bench.last_reply.model == "echo"
        main.on_batch = lambda batch: batch.echo(failing={"bad": ModelFailed("boom")})
        for batch in tuple(main.batches):
            batch.echo()
        await asyncio.gather(*waiting)
        with pytest.raises(ModelFailed, match="boom"):
            await bench.infer("bad", model="main")


async def test_a_fallback_that_does_not_fit_or_leads_in_a_circle_leaves_the_error_as_it_was(tmp_path: Path) -> None:
    other = replace(
        ECHO, model="other", revision="ef" * 32,
        signature=Signature((TensorSpec("input", DataType.FP32, ("rows", "any")),), ECHO.signature.outputs),
    )
    unfit = replace(MAIN, fallback=Fallback("other"))
    circle = replace(ECHO, fallback=Fallback("main"))
    async with orchestrator_bench(tmp_path / "a", unfit, other) as bench:
        await bench.add_leader("o", spec=other)
        with pytest.raises(Unavailable, match="main"):
            await bench.infer("r", model="main")
    async with orchestrator_bench(tmp_path / "b", MAIN, circle) as bench:
        with pytest.raises(Unavailable):
            await bench.infer("r", model="main")

"""Groups that die, readers that vanish, orchestrators that were lost: the client's joined answer is that of an undisturbed run."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from stream_bench import NUM_TOKENS, Bench, Leader, Reader, check_whole, eventually, stream_bench, talker, token_of

from tensorway.errors import InvalidRequest, ModelFailed, NotFound, Unavailable
from tensorway.revisions import revision_key
from tensorway.transport.port import Exchange
from tensorway.v1 import inference_pb2 as pb
from tensorway.v1 import link_pb2
from tensorway_orchestrator.generation_wire import read_generation


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with stream_bench(tmp_path, group_wait_s=0.5) as made:
        yield made


async def retire(bench: Bench, leader: Leader) -> None:
    """The registry no longer knows a leader, nor does the orchestrator send it anything."""
    assert leader.lease is not None
    await leader.lease.release()
    group = bench.lane.groups.get(f"{leader.name}#1")
    await eventually(lambda: group is None or group.is_leaving)


def blocks_of(prompt: str) -> tuple[bytes, ...]:
    """As the orchestrator sees a prompt."""
    head = link_pb2.RequestHead(generate=pb.GenerateRequest(text=prompt))
    return read_generation(head, head.SerializeToString()).blocks


@pytest.mark.parametrize("is_starved", [False, True], ids=["quick reader", "starved reader"])
@pytest.mark.parametrize("num_choices", [1, 3])
async def test_a_group_may_die_at_every_token(bench: Bench, num_choices: int, is_starved: bool) -> None:
    survivor = await bench.add_leader("survivor")
    for place in range(NUM_TOKENS + 1):
        survivor.pause.set()  # so that only the victim says the first tokens
        victim = await bench.add_leader(f"victim-{place}")
        victim.dies_at = place * num_choices
        # Three blocks of prompt that only the victim has seen draw the choices to it.
        prompt = f"{place:04d}" * 1000
        bench.lane.places.sent(bench.lane.groups[f"victim-{place}#1"], blocks_of(prompt))
        grants_after_s = 0.001 if is_starved else 0.0
        reader = bench.generate(prompt, sampling=pb.Sampling(seed=place), num_choices=num_choices, grants_after_s=grants_after_s)
        await eventually(lambda victim=victim: victim.has_died)
        survivor.go_on()
        await reader.end()
        check_whole(reader.messages, place, num_choices)
        attempts = [reader.finished(choice).num_attempts for choice in range(num_choices)]
        assert max(attempts) == 2 or place == NUM_TOKENS
        assert len(victim.attempts) == num_choices
        await retire(bench, victim)
    # Where all was said but `finished`, it may have come through.
    assert bench.counted("tensorway_orchestrator_stream_restarts_total") >= NUM_TOKENS * num_choices


async def test_a_stream_outlives_many_groups(bench: Bench) -> None:
    dice = random.Random(11)
    leader = await bench.add_leader("g-0", dies_at=6)
    reader = bench.generate(sampling=pb.Sampling(seed=21), num_choices=3, grants_after_s=0.0005)
    for number in range(1, 15):
        await eventually(lambda leader=leader: leader.has_died)
        await retire(bench, leader)
        # Each choice gets a token or two of it.
        leader = await bench.add_leader(f"g-{number}", dies_at=4 + dice.randrange(3))
    await eventually(lambda: leader.has_died)
    await retire(bench, leader)
    await bench.add_leader("last")
    await reader.end()
    check_whole(reader.messages, 21, 3)
    assert [reader.finished(choice).num_attempts for choice in range(3)] == [16, 16, 16]


async def test_the_same_group_formed_anew_goes_on_after_longer_than_the_wait_for_a_group(bench: Bench) -> None:
    leader = await bench.add_leader("g")
    leader.dies_at = 7
    reader = bench.generate(sampling=pb.Sampling(seed=2))
    await eventually(lambda: leader.has_died)
    await retire(bench, leader)
    await asyncio.sleep(0.8)  # longer than group_wait_s
    await bench.add_leader("g", epoch=2)
    await reader.end()
    check_whole(reader.messages, 2)
    assert (reader.finished().num_attempts, reader.finished().group) == (2, "g#2")
    # The client has waited for its next token meanwhile.
    num_gaps = bench.counted("tensorway_orchestrator_inter_token_seconds_count")
    assert num_gaps == NUM_TOKENS - 1
    assert bench.counted("tensorway_orchestrator_inter_token_seconds_bucket", model="talker", le="0.5") < num_gaps
    assert bench.counted("tensorway_orchestrator_inter_token_seconds_sum") > 0.8


async def test_a_choice_that_was_finished_is_not_begun_again(bench: Bench) -> None:
    leader = await bench.add_leader("g")
    leader.dies_before_reply = True
    reader = bench.generate(sampling=pb.Sampling(seed=2))
    await reader.end()
    check_whole(reader.messages, 2)
    assert reader.finished().num_attempts == 1
    await eventually(lambda: leader.has_died and not bench.lane.num_open)


async def test_what_kills_two_groups_without_a_token_is_not_tried_again(bench: Bench) -> None:
    leaders = [await bench.add_leader(name) for name in "abc"]
    for leader in leaders:
        leader.dies_at = 0
    reader = bench.generate()
    with pytest.raises(ModelFailed, match=r"groups [abc]#1 and [abc]#1 died on this request"):
        await reader.end()
    assert sum(leader.has_died for leader in leaders) == 2


async def test_text_without_a_token_is_not_said_twice(bench: Bench) -> None:
    """The end of an answer that a group says again where it resumes it: it counts only with what follows it."""
    first = await bench.add_leader("a")

    def half(exchange: Exchange) -> bool:
        said = pb.Delta(offset=0, token_ids=[token_of(3, 0, 0)], text=f"{token_of(3, 0, 0)}é ")
        exchange.push(pb.GenerateResponse(delta=said).SerializeToString())
        exchange.push(pb.GenerateResponse(delta=pb.Delta(offset=1, text="the rest")).SerializeToString())
        first.die()
        return True

    first.refuse = half
    reader = bench.generate(sampling=pb.Sampling(seed=3))
    await reader.until(2)
    await bench.add_leader("b")
    await reader.end()
    check_whole(reader.messages, 3)


async def test_unavailable_of_a_leader_that_lives_is_not_asked_for_in_a_rush(bench: Bench) -> None:
    leader = await bench.add_leader("g")

    def refuse(exchange: Exchange) -> bool:
        exchange.fail(Unavailable("epoch 1 is over"))
        return True

    leader.refuse = refuse
    began_s = asyncio.get_running_loop().time()
    with pytest.raises(Unavailable, match="epoch 1 is over"):
        await bench.generate().end()
    assert len(leader.attempts) == 3
    assert asyncio.get_running_loop().time() - began_s > 0.25


@pytest.mark.parametrize("num_choices", [1, 3])
async def test_a_reader_may_vanish_at_every_message(bench: Bench, num_choices: int) -> None:
    leader = await bench.add_leader("g")
    leader.step_s = 0.0005
    for place in range(1, NUM_TOKENS + 2, 4):
        reader = bench.generate(sampling=pb.Sampling(seed=place), num_choices=num_choices)
        await reader.until(place)
        bench.link.cancel(reader.id)
        await eventually(lambda: not bench.lane.num_open and not bench.lane.groups["g#1"].num_in_flight)
        kept = reader.messages[: place]
        again = bench.resume(reader.started.stream_id, len(kept))
        await again.end()
        check_whole([*kept, *again.messages], place, num_choices)
    assert bench.counted("tensorway_orchestrator_stream_resumes_total") == len(range(1, NUM_TOKENS + 2, 4))


async def test_a_reader_whose_link_broke_resumes_over_another_and_its_places_were_free_meanwhile(tmp_path: Path) -> None:
    async with stream_bench(tmp_path, talker(max_sequences=2), group_wait_s=0.5) as bench:
        leader = await bench.add_leader("g")
        leader.step_s = 0.002
        link, task = await bench.connect()
        reader = bench.generate(link=link, sampling=pb.Sampling(seed=4), num_choices=2)
        await reader.until(6)
        task.cancel()
        await eventually(lambda: len(leader.cancelled) == 2 and not bench.lane.groups["g#1"].num_in_flight)
        assert bench.num_parked == 1
        other = bench.generate(sampling=pb.Sampling(seed=5), num_choices=2)
        await other.end()
        check_whole(other.messages, 5, 2)
        again = bench.resume(reader.started.stream_id, 4)
        await again.end()
        check_whole([*reader.messages[:4], *again.messages], 4, 2)


async def test_an_ended_stream_can_be_read_again(bench: Bench) -> None:
    leader = await bench.add_leader("g")
    reader = bench.generate(sampling=pb.Sampling(seed=4))
    await reader.end()
    again = bench.resume(reader.started.stream_id, 3)
    await again.end()
    assert again.messages == reader.messages[3:]
    tail = bench.resume(reader.started.stream_id, len(reader.messages))
    await tail.end()
    assert tail.messages == []
    with pytest.raises(InvalidRequest, match="is ahead of stream"):
        await bench.resume(reader.started.stream_id, len(reader.messages) + 1).end()
    assert len(leader.attempts) == 1


async def test_a_stream_nobody_comes_back_to_is_given_up(tmp_path: Path) -> None:
    async with stream_bench(tmp_path, stream_retention_s=0.2) as bench:
        await bench.add_leader("g")
        reader = bench.generate()
        await reader.end()
        assert bench.num_parked == 1
        await eventually(lambda: bench.num_parked == 0)
        with pytest.raises(NotFound, match=r"given up 0\.2 s after its client had gone"):
            await bench.resume(reader.started.stream_id, 0).end()


async def test_the_oldest_parked_streams_make_room(tmp_path: Path) -> None:
    async with stream_bench(tmp_path, max_parked_streams=2) as bench:
        await bench.add_leader("g")
        readers: list[Reader] = []
        for seed in range(3):
            readers.append(bench.generate(sampling=pb.Sampling(seed=seed)))
            await readers[-1].end()
        assert bench.num_parked == 2
        with pytest.raises(NotFound):
            await bench.resume(readers[0].started.stream_id, 0).end()
        again = bench.resume(readers[1].started.stream_id, 0)
        await again.end()
        check_whole(again.messages, 1)


@pytest.mark.parametrize("num_choices", [1, 3])
async def test_a_stream_whose_orchestrator_was_lost_goes_on_here(bench: Bench, num_choices: int) -> None:
    await bench.add_leader("g")
    whole = bench.generate(sampling=pb.Sampling(seed=9), num_choices=num_choices)
    await whole.end()
    for place in (1, 2, 17, len(whole.messages) - 1):
        have = whole.messages[:place]
        head = link_pb2.RequestHead(
            request_id="r", model="talker", generate=pb.GenerateRequest(text="hello", num_choices=num_choices),
            stream_id=f"of-another-{place}", next_sequence=place, seed=9,
        )
        for choice in range(num_choices):
            ids = [id for each in have if each.delta.choice == choice for id in each.delta.token_ids]
            is_finished = any(each.HasField("finished") and each.finished.choice == choice for each in have)
            head.so_far.add(token_ids=ids, is_finished=is_finished)
        num_gaps = bench.counted("tensorway_orchestrator_inter_token_seconds_count")
        reader = bench.send(head)
        await reader.end()
        check_whole([*have, *reader.messages], 9, num_choices)
        # The first token said here follows one, too, where the client had any of its answer.
        num_said = sum(len(each.delta.token_ids) for each in reader.messages)
        num_begun = sum(not so_far.token_ids for so_far in head.so_far)
        assert bench.counted("tensorway_orchestrator_inter_token_seconds_count") - num_gaps == num_said - num_begun
        again = bench.resume(f"of-another-{place}", place)
        await again.end()
        assert again.messages == reader.messages
        with pytest.raises(NotFound, match="moved here at message"):
            await bench.resume(f"of-another-{place}", place - 1).end()


async def test_a_gateway_that_only_lost_its_link_gets_what_is_known_here(bench: Bench) -> None:
    leader = await bench.add_leader("g")
    reader = bench.generate(sampling=pb.Sampling(seed=9))
    await reader.end()
    head = link_pb2.RequestHead(
        request_id="r", model="talker", generate=pb.GenerateRequest(text="hello"), stream_id=reader.started.stream_id, seed=9,
        next_sequence=5, so_far=[link_pb2.GenerationSoFar(token_ids=[token_of(9, 0, place) for place in range(4)])],
    )
    again = bench.send(head)
    await again.end()
    assert again.messages == reader.messages[5:]
    assert len(leader.attempts) == 1


async def test_a_withdrawn_revision_ends_what_waits_and_lets_run_what_runs(tmp_path: Path) -> None:
    spec = talker(max_sequences=1)
    async with stream_bench(tmp_path, spec) as bench:
        leader = await bench.add_leader("g")
        leader.step_s = 0.005
        running, waiting = bench.generate(sampling=pb.Sampling(seed=1)), bench.generate()
        await running.until(3)
        await bench.registry.delete(revision_key(spec.model, spec.revision))
        with pytest.raises(Unavailable, match="was withdrawn"):
            await waiting.end()
        await running.end()
        check_whole(running.messages, 1)

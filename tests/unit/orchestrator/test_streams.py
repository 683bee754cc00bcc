"""Token streams over real links: what a client reads, whatever happens to groups, readers and places."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from stream_bench import NUM_TOKENS, Bench, check_whole, eventually, stream_bench, talker, token_of, whole_text

from tensorway.deadline import Deadline
from tensorway.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidRequest,
    ModelFailed,
    NotFound,
    Overloaded,
    TensorwayError,
    Unavailable,
)
from tensorway.tensors import decode_bytes, encode_bytes
from tensorway.transport.port import TOKEN_CREDIT, Exchange
from tensorway.v1 import inference_pb2 as pb
from tensorway.v1 import link_pb2


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with stream_bench(tmp_path, group_wait_s=0.5) as made:
        yield made


async def test_a_stream_comes_whole(bench: Bench) -> None:
    await bench.add_leader("g")
    reader = bench.generate(num_choices=3, sampling=pb.Sampling(seed=7))
    await reader.end()
    check_whole(reader.messages, 7, 3)
    assert reader.started.seed == 7
    assert (reader.started.model, reader.started.request_id, len(reader.started.revision)) == ("talker", "r", 64)
    assert len(reader.started.stream_id) >= 16
    assert all((reader.finished(choice).num_attempts, reader.finished(choice).group) == (1, "g#1") for choice in range(3))
    assert bench.counted("tensorway_orchestrator_tokens_total") == 3 * NUM_TOKENS
    # Each token but the first of an answer.
    assert bench.counted("tensorway_orchestrator_inter_token_seconds_count") == 3 * (NUM_TOKENS - 1)
    assert bench.counted("tensorway_orchestrator_requests_total", model="talker", code="OK") == 1
    await eventually(lambda: not bench.lane.groups["g#1"].num_in_flight)


async def test_a_seed_is_drawn_and_told(bench: Bench) -> None:
    await bench.add_leader("g")
    first, second = bench.generate(), bench.generate()
    await asyncio.gather(first.end(), second.end())
    assert first.started.seed != second.started.seed
    assert first.started.stream_id != second.started.stream_id
    check_whole(first.messages, first.started.seed)


async def test_a_reader_without_credit_gets_longer_messages_and_nobody_else_waits(bench: Bench) -> None:
    leader = await bench.add_leader("g")
    slow = bench.generate(sampling=pb.Sampling(seed=1), grants_after_s=None)
    quick = bench.generate(sampling=pb.Sampling(seed=2))
    await quick.end()
    check_whole(quick.messages, 2)
    await eventually(lambda: leader.num_said == 2 * NUM_TOKENS and not bench.lane.groups["g#1"].num_in_flight)
    assert len(slow.messages) == TOKEN_CREDIT
    slow.grant_all()
    await slow.end()
    check_whole(slow.messages, 1)
    # started, seven tokens one by one, all the rest in one, finished
    assert len(slow.messages) == TOKEN_CREDIT + 2


async def test_the_echoed_prompt_comes_once(bench: Bench) -> None:
    leader = await bench.add_leader("a")
    leader.dies_at = 4
    reader = bench.generate(sampling=pb.Sampling(seed=1), echo=True)
    await eventually(lambda: leader.has_died)
    await bench.add_leader("b")
    await reader.end()
    assert [each.delta.text for each in reader.messages if each.delta.is_prompt] == ["hello"]
    check_whole(reader.messages, 1)


async def test_a_model_that_does_not_generate_says_so_and_the_other_way_round(bench: Bench) -> None:
    head = link_pb2.RequestHead(request_id="r", model="talker")
    head.explain.SetInParent()
    with pytest.raises(FailedPrecondition, match="not explained"):
        await bench.send(head).end()
    with pytest.raises(NotFound, match="unknown"):
        await bench.send(link_pb2.RequestHead(model="nobody", generate=pb.GenerateRequest(text="x"))).end()
    with pytest.raises(InvalidRequest, match="num_choices"):
        await bench.generate(num_choices=65).end()
    with pytest.raises(InvalidRequest, match="prompt"):
        await bench.send(link_pb2.RequestHead(model="talker", generate=pb.GenerateRequest())).end()


@pytest.mark.parametrize("error", [InvalidRequest("temperature: too hot", field="sampling"), ModelFailed("ValueError: no")], ids=str)
async def test_an_error_that_no_group_can_help_ends_all_choices(bench: Bench, error: TensorwayError) -> None:
    leader = await bench.add_leader("g")
    leader.pause.set()

    def refuse(exchange: Exchange) -> bool:
        if link_pb2.BatchHead.FromString(exchange.head).generation.choice == 1:
            exchange.fail(error)
            return True
        return False

    leader.refuse = refuse
    reader = bench.generate(num_choices=3)
    with pytest.raises(type(error), match=error.message):
        await reader.end()
    await eventually(lambda: sorted(leader.cancelled) == [0, 2])
    assert not bench.lane.groups["g#1"].num_in_flight
    assert bench.dispatcher.num_open == 0
    with pytest.raises(NotFound):
        await bench.resume(reader.started.stream_id, 0).end()


async def test_a_full_leader_is_asked_again_and_that_is_no_attempt(bench: Bench) -> None:
    leader = await bench.add_leader("g")
    refusals = iter([True] * 8)

    def refuse(exchange: Exchange) -> bool:
        if next(refusals, False):
            exchange.fail(Overloaded("full", retry_after_s=0.01))
            return True
        return False

    leader.refuse = refuse
    reader = bench.generate(sampling=pb.Sampling(seed=3))
    await reader.end()
    check_whole(reader.messages, 3)
    assert reader.finished().num_attempts == 1
    assert len(leader.attempts) == 9


async def test_a_leader_that_breaks_the_protocol_is_left_for_another(bench: Bench) -> None:
    first = await bench.add_leader("a")

    def skip(exchange: Exchange) -> bool:
        for place in (0, 2):
            delta = pb.Delta(offset=place, token_ids=[token_of(5, 0, place)], text=f"{token_of(5, 0, place)}é ")
            exchange.push(pb.GenerateResponse(delta=delta).SerializeToString())
        return True

    first.refuse = skip
    reader = bench.generate(sampling=pb.Sampling(seed=5))
    await reader.until(2)
    second = await bench.add_leader("b")
    await reader.end()
    check_whole(reader.messages, 5)
    assert list(second.attempts[0].generation.so_far.token_ids) == [token_of(5, 0, 0)]
    assert reader.finished().num_attempts == 2


async def test_places_are_kept_and_waiting_is_by_priority_then_deadline(tmp_path: Path) -> None:
    async with stream_bench(tmp_path, talker(max_sequences=2, max_waiting=4)) as bench:
        leader = await bench.add_leader("g")
        leader.pause.set()
        running = [bench.generate() for _ in range(2)]
        await eventually(lambda: len(leader.attempts) == 2)
        waiting = [bench.generate(text, priority=priority, timeout_s=timeout_s) for text, priority, timeout_s in (
            ("low", -1, 5.0), ("late", 0, 15.0), ("soon", 0, 5.0), ("high", 5, 15.0),
        )]
        await eventually(lambda: bench.counted("tensorway_orchestrator_waiting_choices") == 4)
        assert bench.counted("tensorway_orchestrator_open_streams") == 6
        with pytest.raises(Overloaded, match="4 of 4 wait") as refused:
            await bench.generate().end()
        assert refused.value.retry_after_s > 0
        assert len(leader.attempts) == 2
        leader.step_s = 0.001
        leader.go_on()
        await asyncio.gather(*(reader.end() for reader in (*running, *waiting)))
        assert [request.generate.text for request in leader.requests[2:]] == ["high", "soon", "late", "low"]


async def test_more_choices_than_may_run_or_wait_are_refused_together(tmp_path: Path) -> None:
    async with stream_bench(tmp_path, talker(max_sequences=2, max_waiting=3)) as bench:
        leader = await bench.add_leader("g")
        with pytest.raises(Overloaded, match="6 more answers"):
            await bench.generate(num_choices=6).end()
        assert leader.attempts == []
        reader = bench.generate(num_choices=5, sampling=pb.Sampling(seed=4))
        await reader.end()
        check_whole(reader.messages, 4, 5)


async def test_a_deadline_in_the_queue_and_one_on_a_group_name_their_hop(tmp_path: Path) -> None:
    async with stream_bench(tmp_path, talker(max_sequences=1)) as bench:
        leader = await bench.add_leader("g")
        leader.pause.set()
        running = bench.generate(timeout_s=0.4)
        await eventually(lambda: len(leader.attempts) == 1)
        with pytest.raises(DeadlineExceeded, match="in the queue") as queued:
            await bench.generate(timeout_s=0.1).end()
        assert queued.value.hop == "orchestrator"
        with pytest.raises(DeadlineExceeded, match="while a group ran it") as ran:
            await running.end()
        assert ran.value.hop == "group"
        await eventually(lambda: leader.cancelled == [0])
        assert bench.dispatcher.num_open == 0
        with pytest.raises(NotFound):
            await bench.resume(running.started.stream_id, 0).end()


async def test_streams_that_begin_alike_go_to_the_same_group(bench: Bench) -> None:
    leaders = [await bench.add_leader(name) for name in "abc"]
    prompts = [f"{topic} " * 400 for topic in ("apples", "pears", "plums")]
    for number in range(24):
        prompt = prompts[number % 3] + f"question {number}"
        await bench.generate(prompt, sampling=pb.Sampling(seed=number)).end()
        await eventually(lambda: not any(group.num_in_flight for group in bench.lane.groups.values()))
    for prompt in prompts:
        assert sum(any(request.generate.text.startswith(prompt) for request in leader.requests) for leader in leaders) == 1
    # Until load says otherwise: twenty answers that run weigh more than a prefix of eleven blocks.
    for leader in leaders:
        leader.pause.set()
        leader.requests.clear()
    readers = [bench.generate(prompts[0] + f"again {number}") for number in range(20)]
    await eventually(lambda: sum(len(leader.requests) for leader in leaders) == 20)
    assert min(len(leader.requests) for leader in leaders) >= 4
    for leader in leaders:
        leader.go_on()
    await asyncio.gather(*(reader.end() for reader in readers))


async def test_no_group_is_waited_for_and_then_said(bench: Bench) -> None:
    with pytest.raises(Unavailable, match="no group serves"):
        await bench.generate().end()
    with pytest.raises(Unavailable, match="no group serves"):
        await bench.generate(timeout_s=5).end()


async def test_infer_on_a_generating_model_gives_whole_texts(bench: Bench) -> None:
    leader = await bench.add_leader("g")
    content = encode_bytes([b"one", "zwei ü".encode()])
    head = link_pb2.RequestHead(request_id="r", model="talker", rows=2)
    head.inputs.add(name="text", dtype=14, shape=[2], num_bytes=len(content))
    for name, value in (("max_tokens", 12), ("seed", 9), ("top_k", 3)):
        head.parameters[name].int64_value = value
    head.parameters["temperature"].double_value = 0.5
    head.parameters["stop"].string_value = "###"
    reply = await bench.link.call(head.SerializeToString(), (content,), Deadline.after(10))
    told = link_pb2.ReplyHead.FromString(reply.head)
    outputs = link_pb2.ResponseHead.FromString(told.response).outputs
    assert [(tensor.name, tensor.dtype, list(tensor.shape)) for tensor in outputs] == [("text", 14, [2])]
    assert decode_bytes(b"".join(map(bytes, reply.payload))) == [whole_text(9, 0, 12).encode()] * 2
    usage = link_pb2.ResponseHead.FromString(told.response).parameters
    assert {name: value.int64_value for name, value in usage.items()} == {"num_prompt_tokens": 6, "num_completion_tokens": 24}
    assert (told.timing.group, told.timing.num_attempts, told.timing.batch_rows) == ("g#1", 1, 2)
    assert told.timing.group_us > 0
    asked = leader.requests[1].generate
    assert (asked.text, asked.sampling.top_k, asked.sampling.temperature, list(asked.stop.strings)) == ("zwei ü", 3, 0.5, ["###"])
    assert bench.num_parked == 0

    head.parameters["beams"].int64_value = 4
    with pytest.raises(InvalidRequest, match="beams"):
        await bench.link.call(head.SerializeToString(), (content,), Deadline.after(10))


async def test_one_failed_row_fails_the_inference_and_frees_the_others(bench: Bench) -> None:
    leader = await bench.add_leader("g")
    leader.pause.set()

    def refuse(exchange: Exchange) -> bool:
        if len(leader.attempts) == 2:
            exchange.fail(ModelFailed("ValueError: not this one"))
        return len(leader.attempts) == 2

    leader.refuse = refuse
    content = encode_bytes([b"a", b"b", b"c"])
    head = link_pb2.RequestHead(request_id="r", model="talker", rows=3)
    head.inputs.add(name="text", dtype=14, shape=[3], num_bytes=len(content))
    with pytest.raises(ModelFailed, match="not this one"):
        await bench.link.call(head.SerializeToString(), (content,), Deadline.after(10))
    await eventually(lambda: len(leader.cancelled) == 2 and not bench.lane.groups["g#1"].num_in_flight)
    assert bench.dispatcher.num_open == 0


async def test_the_orchestrator_can_be_called_alone(bench: Bench) -> None:
    await bench.add_leader("g")
    method = "/tensorway.v1.InferenceService/Generate"
    async with grpc.aio.insecure_channel(bench.endpoint) as channel:
        request = pb.GenerateRequest(model="talker", text="hi", request_id="r", sampling=pb.Sampling(seed=6), num_choices=2)
        call = channel.unary_stream(method)(request.SerializeToString(), timeout=10)
        messages = [pb.GenerateResponse.FromString(message) async for message in call]
        check_whole(messages, 6, 2)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            async for _ in channel.unary_stream(method)(pb.GenerateRequest(model="x", text="hi").SerializeToString(), timeout=10):
                pass
        assert failed.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_call_that_is_cancelled_frees_its_place(bench: Bench) -> None:
    leader = await bench.add_leader("g")
    leader.pause.set()
    async with grpc.aio.insecure_channel(bench.endpoint) as channel:
        request = pb.GenerateRequest(model="talker", text="hi")
        call = channel.unary_stream("/tensorway.v1.InferenceService/Generate")(request.SerializeToString(), timeout=10)
        await call.read()
        await eventually(lambda: len(leader.attempts) == 1)
        call.cancel()
        await eventually(lambda: leader.cancelled == [0] and bench.dispatcher.num_open == 0)


async def test_taken_over_streams_tell_their_old_reader(bench: Bench) -> None:
    leader = await bench.add_leader("g")
    leader.step_s = 0.005
    old = bench.generate(sampling=pb.Sampling(seed=8))
    await old.until(5)
    new = bench.resume(old.started.stream_id, 3)
    with pytest.raises(Cancelled, match="taken over"):
        await old.end()
    await new.end()
    check_whole([*old.messages[:3], *new.messages], 8)
    assert len(leader.attempts) == 1

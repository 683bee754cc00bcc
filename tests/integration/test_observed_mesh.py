"""What a mesh lets be seen of itself, on one mesh: traces as a receiver of OTLP gets them, profiles of whole groups, log levels and
lines."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from tensorway import AsyncClient, Client
from tensorway.client_operations import ProfileProgress, ProfileWish
from tensorway.errors import FailedPrecondition, InvalidRequest, ModelFailed, NotFound
from tensorway.registry.port import GROUP
from tensorway.telemetry.ops_service import GET_LOG_LEVEL
from tensorway.transport.channel import AsyncChannel
from tensorway.v1 import ops_pb2
from tensorway.v1.inference_pb2 import GenerateRequest
from tests.integration.generate_world import GENERATE, Call, resume, talk_of
from tests.integration.generate_world import ask as ask_tokens
from tests.integration.hurt_groups import RAISE, ask
from tests.integration.observed_world import (
    INFER,
    PIPELINE_TREE,
    STATE,
    Caller,
    World,
    busy,
    gathered,
    labels,
    one,
    operators,
    reader_of,
    running_world,
    spans_of,
    tensorway,
)
from tests.integration.span_receiver import tree
from tests.integration.test_faults import wait_gone

pytestmark = [pytest.mark.models, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with running_world(tmp_path_factory.mktemp("observed")) as made:
        yield made


async def test_one_request_is_one_trace_down_to_every_rank(world: World) -> None:
    caller = Caller()
    async with AsyncClient(world.mesh.endpoint, metadata=caller.metadata) as client:
        await client.infer(world.pipeline, ask((0, 0, 0)), request_id="the-one")
    spans = await spans_of(world, caller, 7)
    assert tree(spans) == PIPELINE_TREE
    gateway, attempt, batch = one(spans, INFER), one(spans, "attempt"), one(spans, "batch")
    assert gateway.parent_id == caller.span_id
    assert {span.span.trace_state for span in spans} == {STATE}
    assert attempt.links == {(caller.trace_id, batch.id)}
    assert batch.links == {(caller.trace_id, attempt.id)}
    assert gateway.attributes["rpc.method"] == INFER
    assert gateway.attributes["rpc.response.status_code"] == "OK"
    assert gateway.attributes["tensorway.request_id"] == "the-one"
    assert gateway.attributes["tensorway.model"] == world.pipeline
    assert (attempt.attributes["tensorway.attempt"], batch.attributes["tensorway.batch_requests"]) == (1, 1)
    assert attempt.attributes["tensorway.group"] == gateway.attributes["tensorway.group"]
    for rank in (0, 1):
        part = one(spans, f"rank {rank}")
        assert part.attributes["tensorway.rank"] == rank
        # The operators that took longest (`trace_step_detail`).
        assert len(part.events) == 3
        assert all(name.startswith("aten::") for name in part.events)
    assert {span.service: span.resource["cloud.availability_zone"] for span in spans} == dict.fromkeys(
        ("gateway", "orchestrator", "rank"), "here"
    )
    assert gateway.resource["service.instance.id"] == "gateway-1"
    assert gateway.resource["service.version"]
    assert world.receiver.metadata[0]["x-tenant"] == "blue"
    # Times that are made after the fact still lie within each other, but for what clocks of processes differ.
    by_id = {span.id: span.span for span in spans}
    for span in spans:
        parent = by_id.get(span.parent_id)
        assert span.span.start_time_unix_nano <= span.span.end_time_unix_nano
        if parent is not None:
            assert parent.start_time_unix_nano - 1_000_000 <= span.span.start_time_unix_nano
            assert span.span.end_time_unix_nano <= parent.end_time_unix_nano + 1_000_000


async def test_a_batch_links_to_every_sampled_request_in_it(world: World) -> None:
    callers = [Caller(), Caller(is_sampled=False), Caller()]
    row = {"gate": np.array([b""], dtype=object)}
    async with asyncio.TaskGroup() as tasks:
        for caller in callers:
            tasks.create_task(_infer(world, caller, row))
    await world.receiver.wait(lambda: sum(span.name == "attempt" for caller in callers for span in world.receiver.of(caller.trace_id)) == 2)
    await world.receiver.wait(lambda: any(span.name == "step" for caller in callers for span in world.receiver.of(caller.trace_id)))
    spans = [span for caller in callers for span in world.receiver.of(caller.trace_id)]
    assert not world.receiver.of(callers[1].trace_id)
    batch = one(spans, "batch")
    attempts = [span for span in spans if span.name == "attempt"]
    assert batch.attributes["tensorway.batch_requests"] == 3
    assert batch.links == {(span.trace_id, span.id) for span in attempts}
    assert {span.trace_id for span in attempts} == {callers[0].trace_id, callers[2].trace_id}
    assert all(span.links == {(batch.trace_id, batch.id)} for span in attempts)
    assert batch.parent_id in {span.id for span in attempts}
    assert one(spans, "step").parent_id == batch.id


async def _infer(world: World, caller: Caller, inputs: dict[str, Any]) -> None:
    async with AsyncClient(world.mesh.endpoint, metadata=caller.metadata) as client:
        await client.infer("gate", inputs)


async def test_an_attempt_on_a_group_that_died_is_seen(world: World, tmp_path: Path) -> None:
    fifo = tmp_path / "shut"
    os.mkfifo(fifo)
    # A writer without which no reader comes to its end; for reading as well, so that nobody is waited for.
    writer = os.open(fifo, os.O_RDWR)
    caller = Caller()
    rows = {"gate": np.array([str(fifo).encode(), b"", b""], dtype=object)}
    try:
        async with asyncio.TaskGroup() as tasks:
            request = tasks.create_task(_infer(world, caller, rows))
            first = await reader_of(world, fifo)
            os.kill(first, signal.SIGKILL)
            await wait_gone(first)
            await reader_of(world, fifo, first)
            os.close(writer)
            writer = -1
            await request
    finally:
        if writer >= 0:
            os.close(writer)
    spans = await spans_of(world, caller, 8)
    assert tree(spans) == f"""\
gateway: {INFER}
  orchestrator: queue
  orchestrator: attempt !
    orchestrator: batch !
  orchestrator: queue
  orchestrator: attempt
    orchestrator: batch
      rank: step"""
    first_span, second = sorted((span for span in spans if span.name == "attempt"), key=lambda span: span.span.start_time_unix_nano)
    assert "UNAVAILABLE" in first_span.span.status.message
    assert second.events == ["retry"]
    assert second.attributes["tensorway.attempt"] == 2


async def test_other_dialects_and_streams_are_traced_alike(world: World) -> None:
    oip, tokens = Caller(), Caller()
    channel = AsyncChannel(world.mesh.endpoint, metadata=tuple(oip.metadata.items()))
    try:
        # An empty message names no model: NOT_FOUND, and still a trace.
        with pytest.raises(NotFound):
            await channel.unary("/inference.GRPCInferenceService/ModelInfer", b"", 30.0)
    finally:
        await channel.close()
    (span,) = [span for span in await spans_of(world, oip, 1) if span.service == "gateway"]
    assert (span.name, span.attributes["rpc.response.status_code"]) == ("inference.GRPCInferenceService/ModelInfer", "NOT_FOUND")
    assert not span.has_failed  # it is the caller's error
    async with talk_of(world.mesh) as talk:
        request = ask_tokens(world.tokens, (5, 6, 7), 4)
        stream = talk.channel().server_stream(
            "/tensorway.v1.InferenceService/Generate", request.SerializeToString(), 60.0, tuple(tokens.metadata.items())
        )
        while await stream.read() is not None:
            pass
    spans = await spans_of(world, tokens, 4)
    assert tree(spans) == """\
gateway: tensorway.v1.InferenceService/Generate
  orchestrator: queue
  orchestrator: attempt
    rank: answer"""
    answer = one(spans, "answer")
    assert answer.events == ["prefill", "first token", "decode"]
    assert (answer.attributes["tensorway.prompt_tokens"], answer.attributes["tensorway.completion_tokens"]) == (3, 4)
    assert one(spans, "tensorway.v1.InferenceService/Generate").events == ["first token sent"]
    assert one(spans, "attempt").events == ["first message"]


async def test_who_goes_on_with_a_stream_is_traced_apart(world: World) -> None:
    first, second = Caller(), Caller()
    request = ask_tokens(world.tokens, (5, 6, 7), 240)
    async with talk_of(world.mesh) as talk:

        def called(message: GenerateRequest, caller: Caller) -> Call:
            metadata = tuple(caller.metadata.items())
            return Call(talk.channel().server_stream(GENERATE, message.SerializeToString(), 60.0, metadata))

        async with called(request, first) as call:
            await call.tokens(1)
            kept = call.told
        # It waits for its reader, and for nothing else, once the group has been told.
        await world.receiver.wait(lambda: any(span.name == "attempt" for span in world.receiver.of(first.trace_id)))
        async with called(resume(kept), second) as call:
            while await call.next() is not None:
                pass
            assert len(kept.ids()) + sum(len(delta.token_ids) for delta in call.told.deltas()) == 240
    spans = await spans_of(world, second, 5)
    assert tree(spans) == """\
gateway: tensorway.v1.InferenceService/Generate
  orchestrator: resume
  orchestrator: queue
  orchestrator: attempt
    rank: answer"""
    begun = one(world.receiver.of(first.trace_id), "tensorway.v1.InferenceService/Generate")
    assert one(spans, "resume").links == {(first.trace_id, begun.id)}
    assert one(spans, "resume").attributes["tensorway.is_running"] is False
    assert begun.events == ["first token sent", "the client has gone"]


async def test_a_message_that_cannot_be_read_is_traced_and_told(world: World) -> None:
    callers = [Caller() for _ in range(4)]
    methods = (f"/{INFER}", f"/{INFER[:-5]}Explain", "/inference.GRPCInferenceService/ModelInfer", GENERATE)
    for method, caller in zip(methods, callers, strict=True):
        channel = AsyncChannel(world.mesh.endpoint, metadata=tuple(caller.metadata.items()))
        try:
            asked = channel.server_stream(method, b"\xff", 30.0).read() if method == GENERATE else channel.unary(method, b"\xff", 30.0)
            with pytest.raises(InvalidRequest, match="the message is no"):
                await asked
        finally:
            await channel.close()
    for method, caller in zip(methods, callers, strict=True):
        (span,) = await spans_of(world, caller, 1)
        assert (f"/{span.name}", span.attributes["rpc.response.status_code"]) == (method, "INVALID_ARGUMENT")
        assert span.parent_id == caller.span_id
        assert (span.attributes["tensorway.model"], span.attributes["tensorway.request_bytes"]) == ("", 1)


async def test_log_lines_lead_to_their_trace_and_back(world: World) -> None:
    caller = Caller()
    async with AsyncClient(world.mesh.endpoint, metadata=caller.metadata) as client:
        await client.set_log_level("debug")
        await client.infer(world.pipeline, ask((0, 0, 0)), request_id="well")
        with pytest.raises(ModelFailed):
            await client.infer(world.pipeline, ask((0, RAISE, 0)), request_id="ill")
        of_both = {"model": world.pipeline, "trace_id": caller.trace_id}
        line = await world.logged("gateway-1", message="request answered", request_id="well", **of_both)
        assert line["group"].startswith(world.pipeline)
        await world.logged("gateway-1", request_id="ill", status="INTERNAL", **of_both)
        await world.logged("orchestrator-1", request_id="ill", status="INTERNAL", **of_both)
        line = await world.logged("node-1", service="rank", request_id="ill", rank=0, **of_both)
        assert line["group"].startswith(world.pipeline)
        await client.set_log_level("info")


async def test_what_is_not_sampled_sends_nothing(world: World) -> None:
    """Not without a context where the share is 0, not where the caller says no, and not with one that is malformed."""
    refused = Caller(is_sampled=False)
    broken = {"traceparent": "00-not-a-trace-01"}
    for metadata in ({}, refused.metadata, broken):
        async with AsyncClient(world.mesh.endpoint, metadata=metadata) as client:
            await client.infer(world.pipeline, ask((0, 0, 0)))
    # Each process sends its spans in order: those of what came before have come by the time that all of a later request have.
    sampled = Caller()
    async with AsyncClient(world.mesh.endpoint, metadata=sampled.metadata) as client:
        await client.infer(world.pipeline, ask((0, 0, 0)))
    await spans_of(world, sampled, 7)
    assert not world.receiver.of(refused.trace_id)
    # All others here begin at a caller.
    assert [span.name for span in world.receiver.spans if not span.parent_id] == []


async def test_a_client_that_opentelemetry_instruments_is_part_of_the_trace(world: World) -> None:
    from opentelemetry import trace
    from opentelemetry.instrumentation.grpc import GrpcInstrumentorClient
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exported = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported))
    trace.set_tracer_provider(provider)  # the instrumentation knows no other

    def call() -> None:
        with Client(world.mesh.endpoint) as client, provider.get_tracer("test").start_as_current_span("mine"):
            client.infer(world.pipeline, ask((0, 0, 0)))

    await asyncio.to_thread(call)
    (mine,) = exported.get_finished_spans()
    trace_id = f"{mine.context.trace_id:032x}"
    await world.receiver.wait(lambda: len(world.receiver.of(trace_id)) == 7)
    # Our own client passes the current span on.
    assert one(world.receiver.of(trace_id), INFER).parent_id == f"{mine.context.span_id:016x}"
    exported.clear()
    instrumentor = GrpcInstrumentorClient()
    instrumentor.instrument()
    try:
        await asyncio.to_thread(call)
    finally:
        instrumentor.uninstrument()
    theirs, mine = exported.get_finished_spans()
    assert theirs.kind is trace.SpanKind.CLIENT
    trace_id = f"{mine.context.trace_id:032x}"
    await world.receiver.wait(lambda: len(world.receiver.of(trace_id)) == 7)
    # The instrumentation's span is the nearer one.
    assert one(world.receiver.of(trace_id), INFER).parent_id == f"{theirs.context.span_id:016x}"


async def test_every_rank_of_a_busy_group_is_recorded(world: World) -> None:
    async with AsyncClient(world.mesh.endpoint) as client, busy(world) as num_right:
        before = num_right[0]
        progress, trace = await gathered(client, ProfileWish(world.pipeline, num_steps=5, with_shapes=True))
        assert num_right[0] > before
    assert labels(trace) == {0: "rank 0 (stage 0, shard 0)", 1: "rank 1 (stage 1, shard 0)"}
    by_rank = operators(trace)
    assert by_rank.keys() == {0, 1}
    for events in by_rank.values():
        linear = [event for event in events if event["name"] == "aten::linear"]
        # Two layers a stage with two linears each, in every step.
        assert len(linear) >= 5 * 4 - 4
        assert all("Input Dims" in event["args"] for event in linear)
    # One clock: a step's second stage follows its first.
    first, second = ([event["ts"] for event in by_rank[rank] if event["name"] == "aten::linear"] for rank in (0, 1))
    assert abs(min(first) - min(second)) < 30e6
    assert max(second) > min(first)
    assert progress[0].state == "recording"
    assert [one.state for one in progress[-2:]] == ["gathering", "done"]
    assert progress[-1].num_steps == progress[-1].num_wanted == 5


async def test_an_idle_group_says_that_it_did_nothing(world: World) -> None:
    async with AsyncClient(world.mesh.endpoint) as client:
        with pytest.raises(FailedPrecondition, match=r"ran no step in 0\.5 s; send requests"):
            await gathered(client, ProfileWish(world.pipeline, max_s=0.5))
    assert not list(world.temporary.glob("tensorway-profile-*"))


async def test_what_is_recorded_when_the_time_is_over_is_the_answer(world: World) -> None:
    async with AsyncClient(world.mesh.endpoint) as client, talk_of(world.mesh) as talk:
        waiting = client.profile(ProfileWish(world.tokens, num_steps=1000, max_s=1.5))
        async with aclosing(waiting) as replies:
            first = await anext(replies)
            assert isinstance(first, ProfileProgress)
            await talk.answer(ask_tokens(world.tokens, (5, 6, 7), 6))
            content = b"".join([reply async for reply in replies if isinstance(reply, bytes)])
    trace = json.loads(gzip.decompress(content))
    assert labels(trace) == {0: "rank 0"}
    assert "aten::argmax" in {event["name"] for event in operators(trace)[0]}


async def test_a_second_profile_is_refused_and_a_cancelled_one_leaves_nothing(world: World) -> None:
    (group,) = [row for row in await world.mesh.members(GROUP) if row.metadata["model"] == world.pipeline]
    async with AsyncClient(world.mesh.endpoint) as client:
        async with aclosing(client.profile(ProfileWish(group=group.id, num_steps=1000, max_s=60.0))) as replies:
            first = await anext(replies)
            assert isinstance(first, ProfileProgress)
            assert (first.group, first.num_steps, first.state) == (group.id, 0, "recording")
            with pytest.raises(FailedPrecondition, match="being profiled already"):
                await gathered(client, ProfileWish(world.pipeline, num_steps=1))
        # The one that was closed is over as soon as its leader hears of it.
        async with busy(world), asyncio.timeout(30):
            while True:
                try:
                    _, trace = await gathered(client, ProfileWish(world.pipeline, num_steps=2))
                    break
                except FailedPrecondition:
                    await asyncio.sleep(0.02)
        assert operators(trace).keys() == {0, 1}
    assert not list(world.temporary.glob("tensorway-profile-*"))


async def test_wishes_that_cannot_be_met_are_named(world: World) -> None:
    async with AsyncClient(world.mesh.endpoint) as client:
        with pytest.raises(NotFound, match="nobody"):
            await gathered(client, ProfileWish("nobody"))
        with pytest.raises(NotFound, match="no-group"):
            await gathered(client, ProfileWish(group="no-group"))
        with pytest.raises(InvalidRequest, match="num_steps"):
            await gathered(client, ProfileWish(world.pipeline, num_steps=1001))


async def test_the_command_writes_a_file(world: World, tmp_path: Path) -> None:
    async with busy(world):
        said = await tensorway("profile", world.pipeline, "--steps", "2", "-o", tmp_path / "trace.json.gz", endpoint=world.mesh.endpoint)
    assert "2 steps" in said
    assert "perfetto" in said
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json.gz"]
    assert labels(json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))).keys() == {0, 1}


async def level_of(endpoint: str) -> ops_pb2.GetLogLevelResponse:
    channel = AsyncChannel(endpoint)
    try:
        return ops_pb2.GetLogLevelResponse.FromString((await channel.unary(GET_LOG_LEVEL, b"", 10.0)).response)
    finally:
        await channel.close()


async def test_log_levels_are_changed_for_a_while(world: World) -> None:
    mesh = world.mesh
    (leader,) = [row for row in await mesh.members(GROUP) if row.metadata["model"] == world.pipeline]
    said = await tensorway("logs", "level", "debug", "--for", "1h", endpoint=mesh.endpoint)
    for name in ("gateway-1", "orchestrator-1", "node-1", leader.id):
        assert name in said.replace("\n", "")
    for endpoint in (mesh.endpoint, leader.endpoint):
        level = await level_of(endpoint)
        assert (level.level, level.next_level) == ("debug", "info")
        assert 3000 < level.next_in_seconds <= 3600
    async with AsyncClient(mesh.endpoint) as client:
        await client.infer(world.pipeline, ask((0, 0, 0)), request_id="seen-in-the-logs")
        changes = await client.set_log_level("info", ["gateway-1", leader.id], seconds=0)
        assert {(change.id, change.previous, change.error) for change in changes} == {("gateway-1", "debug", ""), (leader.id, "debug", "")}
        with pytest.raises(InvalidRequest, match="loud"):
            await client.set_log_level("loud")
        with pytest.raises(NotFound, match="nobody"):
            await client.set_log_level("info", ["nobody"])
        # Back by itself.
        await client.set_log_level("error", ["orchestrator-1"], seconds=0.05)
        (orchestrator,) = await mesh.members("orchestrator")
        async with asyncio.timeout(30):
            while (await level_of(orchestrator.endpoint)).level != "info":
                await asyncio.sleep(0.02)
    lines = [json.loads(line) for line in (mesh.processes.log_dir / "gateway-1.log").read_text().splitlines() if "seen-in-the-logs" in line]
    assert [(line["message"], line["model"], line["status"]) for line in lines] == [("request answered", world.pipeline, "OK")]
    # Rank 1 is told by its leader.
    node_log = (mesh.processes.log_dir / "node-1.log").read_text()
    assert '"message": "log level is debug, as the leader\'s"' in node_log


async def test_what_waits_is_exported_before_a_service_ends(world: World) -> None:
    """The last test: the mesh has no gateway afterwards."""
    caller = Caller()
    async with AsyncClient(world.mesh.endpoint, metadata=caller.metadata) as client:
        await client.infer(world.pipeline, ask((0, 0, 0)))
    gateway = world.mesh.processes.members["gateway-1"].process
    gateway.terminate()
    async with asyncio.timeout(30):
        await gateway.wait()
    # No later than its end: its thread waits a second otherwise.
    await world.receiver.wait(lambda: any(span.service == "gateway" for span in world.receiver.of(caller.trace_id)))
    assert tree(await spans_of(world, caller, 7)) == PIPELINE_TREE

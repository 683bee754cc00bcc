"""Traces of real requests through a whole mesh, as a receiver of OTLP gets them."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import yaml

from tensorway import AsyncClient, Client
from tensorway.errors import NotFound
from tensorway.transport.channel import AsyncChannel
from tests.integration.conftest import TEST_MODELS, Mesh, running_mesh
from tests.integration.generate_world import ask as ask_tokens
from tests.integration.generate_world import small, talk_of
from tests.integration.hurt_groups import ask, staged
from tests.integration.span_receiver import Received, Receiver, span_receiver, tree
from tests.integration.test_faults import wait_gone

pytestmark = [pytest.mark.models, pytest.mark.asyncio(loop_scope="module")]

INFER = "tensorway.v1.InferenceService/Infer"
STATE = "vendor=value"


@dataclass
class World:
    """A mesh of traced services, and what they export."""

    mesh: Mesh
    receiver: Receiver
    pipeline: str
    tokens: str


def gates(models: Path) -> str:
    """A model of two groups, whose batches leave with three rows, and whose steps end when their files are read."""
    (models / "gate").mkdir(parents=True)
    document = yaml.safe_load((TEST_MODELS / "gate" / "model.yaml").read_text())
    document |= {"batching": {"max_rows": 3, "max_delay_ms": 5000}, "replicas": 2}
    (models / "gate" / "model.yaml").write_text(yaml.safe_dump(document))
    (models / "gate" / "model.py").write_text((TEST_MODELS / "gate" / "model.py").read_text())
    return "gate"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("traces")
    models = folder / "models"
    names = (gates(models), staged(models, 2, 1), small(models, "tokens", num_layers=2))
    headers = folder / "headers"
    headers.write_text("# who we are\nx-tenant: blue\n")
    async with span_receiver() as receiver:
        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setenv("TENSORWAY_TRACE_ENDPOINT", receiver.endpoint)
            patch.setenv("TENSORWAY_TRACE_HEADERS_FILE", str(headers))
            patch.setenv("TENSORWAY_ZONE", "here")
            async with running_mesh(folder, *names, models_dir=models) as mesh:
                yield World(mesh, receiver, *names[1:])


class Caller:
    """What a client sends along, and the ids in it."""

    def __init__(self, *, is_sampled: bool = True) -> None:
        self.trace_id, self.span_id = secrets.token_hex(16), secrets.token_hex(8)
        self.metadata = {"traceparent": f"00-{self.trace_id}-{self.span_id}-{'01' if is_sampled else '00'}", "tracestate": STATE}


def one(spans: list[Received], name: str) -> Received:
    (found,) = [span for span in spans if span.name == name]
    return found




async def spans_of(world: World, caller: Caller, count: int) -> list[Received]:
    """The spans of a trace, once so many have come."""
    await world.receiver.wait(lambda: len(world.receiver.of(caller.trace_id)) >= count)
    return world.receiver.of(caller.trace_id)


PIPELINE_TREE = f"""\
gateway: {INFER}
  orchestrator: queue
  orchestrator: attempt
    orchestrator: batch
      rank: step
        rank: rank 0
        rank: rank 1"""


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
    assert [one(spans, f"rank {rank}").attributes["tensorway.rank"] for rank in (0, 1)] == [0, 1]
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


def has_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open."""
    return any(os.readlink(entry) == str(path) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink())


async def test_an_attempt_on_a_group_that_died_is_seen(world: World, tmp_path: Path) -> None:
    fifo = tmp_path / "shut"
    os.mkfifo(fifo)
    caller = Caller()
    rows = {"gate": np.array([str(fifo).encode(), b"", b""], dtype=object)}
    async with asyncio.TaskGroup() as tasks:
        request = tasks.create_task(_infer(world, caller, rows))
        # Opens once the model reads it: the step runs.
        first = await asyncio.to_thread(os.open, fifo, os.O_WRONLY)
        (reading,) = [pid for leader in await world.mesh.leaders() if has_open(pid := int(leader.metadata["pid"]), fifo)]
        os.kill(reading, signal.SIGKILL)
        await wait_gone(reading)
        os.close(first)
        os.close(await asyncio.to_thread(os.open, fifo, os.O_WRONLY))
        await request
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
    (span,) = await spans_of(world, oip, 1)
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


async def test_what_is_not_sampled_sends_nothing(world: World) -> None:
    """Not without a context where the share is 0, not where the caller says no, and not with one that is malformed."""
    refused = Caller(is_sampled=False)
    broken = {"traceparent": "00-not-a-trace-01"}
    before = len(world.receiver.spans)
    for metadata in ({}, refused.metadata, broken):
        async with AsyncClient(world.mesh.endpoint, metadata=metadata) as client:
            await client.infer(world.pipeline, ask((0, 0, 0)))
    # Spans of what came before them have come by the time that those of a later request have.
    sampled = Caller()
    async with AsyncClient(world.mesh.endpoint, metadata=sampled.metadata) as client:
        await client.infer(world.pipeline, ask((0, 0, 0)))
    await spans_of(world, sampled, 7)
    assert len(world.receiver.spans) == before + 7


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

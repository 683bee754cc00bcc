"""The native dialect and the way upstream, over real gRPC on both server implementations."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tensorway.client import AsyncClient
from tensorway.errors import DeadlineExceeded, InvalidRequest, ModelFailed, NotFound, Overloaded, TensorwayError, Unavailable
from tensorway.tensors import DataType
from tensorway.transport import AsyncChannel
from tensorway.transport.port import Exchange
from tensorway.v1 import inference_pb2, link_pb2, tensor_pb2
from tests.contract.gateway.scripted import ECHO, MIXED, Script, ScriptedOrchestrator, answer, running_mesh, spec, want

pytestmark = pytest.mark.parametrize("implementation", ["completion-queue", "aio"])
INFER = "/tensorway.v1.InferenceService/Infer"
X = np.arange(8, dtype=np.float32).reshape(2, 4)


def failing(error: TensorwayError) -> Script:
    return lambda exchange, head: exchange.fail(error)


def never(exchange: Exchange, head: link_pb2.RequestHead) -> None:
    """Takes the request and keeps it."""


async def test_tensors_come_back_with_their_timing(tmp_path: Path, implementation: str) -> None:
    async with running_mesh(tmp_path, implementation=implementation) as mesh, AsyncClient(mesh.endpoint) as client:
        result = await client.infer("echo", {"x": X}, request_id="mine", priority=7, parameters={"k": 1, "b": True, "f": 0.5, "s": "t"})
        assert np.array_equal(result["y"], X)
        assert (result.model, result.revision, result.request_id) == ("echo", ECHO.revision, "mine")
        assert result.parameters == {"k": 1, "b": True, "f": 0.5, "s": "t"}
        timing = result.timing
        assert (timing.queue_us, timing.wait_us, timing.step_us, timing.group, timing.num_attempts) == (11, 7, 50, "group-1", 1)
        assert (timing.batch_rows, timing.batch_requests) == (2, 1)
        (head,) = mesh.orchestrators[0].heads
        assert (head.rows, head.priority, head.model, head.revision, head.request_id) == (2, 7, "echo", ECHO.revision, "mine")


async def test_many_inputs_and_chosen_outputs(tmp_path: Path, implementation: str) -> None:
    inputs = {"flag": np.bool_(True), "b": np.array([1, -2, 3], np.int8), "a": np.arange(6).reshape(3, 2)}
    async with running_mesh(tmp_path, implementation=implementation) as mesh, AsyncClient(mesh.endpoint) as client:
        result = await client.infer("mixed", inputs)
        assert list(result) == ["a2", "b2", "flag2"]
        assert np.array_equal(result["a2"], inputs["a"])
        assert result["flag2"].shape == ()
        chosen = await client.infer("mixed", inputs, outputs=["flag2", "a2"])
        assert list(chosen) == ["flag2", "a2"]
        assert mesh.orchestrators[0].heads[0].rows == 1
        empty = await client.infer("mixed", {"flag": np.bool_(False), "b": np.zeros(0, np.int8), "a": np.zeros((0, 2), np.int64)})
        assert empty["a2"].shape == (0, 2)


async def test_a_large_tensor_comes_back_equal(tmp_path: Path, implementation: str) -> None:
    large = np.random.default_rng(0).random((8, 700_000), dtype=np.float32)
    async with running_mesh(tmp_path, implementation=implementation) as mesh, AsyncClient(mesh.endpoint) as client:
        result = await client.infer("echo", {"x": large})
        assert np.array_equal(result["y"], large)


async def test_trailers_tell_what_happened(tmp_path: Path, implementation: str) -> None:
    request = inference_pb2.InferRequest(model="echo", inputs=[tensor_pb2.Tensor(name="x", dtype=12, shape=[1, 1], data=bytes(4))])
    async with running_mesh(tmp_path, implementation=implementation) as mesh:
        channel = AsyncChannel(mesh.endpoint)
        try:
            reply = await channel.unary(INFER, request.SerializeToString(), 5.0)
            given_id = inference_pb2.InferResponse.FromString(reply.response).request_id
            assert re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]+", given_id)
            assert reply.trailers["tensorway-request-id"] == given_id
            assert re.fullmatch(
                r"queue=11us;batch=1/1;group=group-1;attempts=1;wait=7us;step=50us;gateway=\d+us;orchestrator=\d+us",
                str(reply.trailers["tensorway-timing"]),
            )
            request.request_id = "schön % 1"
            reply = await channel.unary(INFER, request.SerializeToString(), 5.0)
            assert reply.trailers["tensorway-request-id"] == "sch%C3%B6n %25 1"
        finally:
            await channel.close()


@pytest.mark.parametrize(
    ("model", "inputs", "options", "kind", "says"),
    [
        ("nope", {"x": X}, {}, NotFound, "model 'nope' is unknown here; models known: brain, echo, mixed, words"),
        ("echo", {"x": X}, {"revision": "ffffffffff"}, NotFound, "no revision 'ffffffffff'"),
        ("echo", {"x": X.astype(np.float64)}, {}, InvalidRequest, "takes FP32, got FP64"),
        ("echo", {"z": X}, {}, InvalidRequest, "has no input 'z', only x"),
        ("echo", {}, {}, InvalidRequest, "also needs input 'x'"),
        ("echo", {"x": X}, {"outputs": ["q"]}, InvalidRequest, "has no output 'q', only y"),
        ("echo", {"x": X}, {"priority": 101}, InvalidRequest, "outside -100 to 100"),
        ("echo", {"x": X}, {"request_id": "i" * 513}, InvalidRequest, "more than 512"),
        ("echo", {"x": np.zeros((9, 1), np.float32)}, {}, InvalidRequest, "9 rows are more than the 8"),
    ],
)
async def test_what_is_refused_never_leaves_the_gateway(
    tmp_path: Path,
    implementation: str,
    model: str,
    inputs: dict[str, object],
    options: dict[str, object],
    kind: type[TensorwayError],
    says: str,
) -> None:
    async with running_mesh(tmp_path, implementation=implementation) as mesh, AsyncClient(mesh.endpoint) as client:
        with pytest.raises(kind, match=re.escape(says)):
            await client.infer(model, inputs, **options)  # type: ignore[arg-type]
        assert mesh.orchestrators[0].heads == []


async def test_a_models_own_error_reaches_the_caller_unchanged(tmp_path: Path, implementation: str) -> None:
    scripts = (failing(ModelFailed("the model said no")),)
    async with running_mesh(tmp_path, implementation=implementation, scripts=scripts) as mesh, AsyncClient(mesh.endpoint) as client:
        with pytest.raises(ModelFailed, match=r"^the model said no$"):
            await client.infer("echo", {"x": X})
        assert len(mesh.orchestrators[0].heads) == 1


async def test_a_draining_orchestrator_is_passed_over(tmp_path: Path, implementation: str) -> None:
    scripts = (failing(Unavailable("draining")), answer, failing(Unavailable("draining")))
    mesh_ = running_mesh(tmp_path, implementation=implementation, scripts=scripts)
    async with mesh_ as mesh, AsyncClient(mesh.endpoint, retries=0) as client:
        for _ in range(3):
            assert np.array_equal((await client.infer("echo", {"x": X}))["y"], X)


async def test_when_all_refuse_the_last_refusal_is_told(tmp_path: Path, implementation: str) -> None:
    scripts = (failing(Unavailable("gone fishing")),) * 2
    mesh_ = running_mesh(tmp_path, implementation=implementation, scripts=scripts)
    async with mesh_ as mesh, AsyncClient(mesh.endpoint, retries=0) as client:
        with pytest.raises(Unavailable, match="gone fishing"):
            await client.infer("echo", {"x": X})
        assert [len(orchestrator.heads) for orchestrator in mesh.orchestrators] == [1, 1]


async def test_a_request_survives_the_death_of_its_orchestrator(tmp_path: Path, implementation: str) -> None:
    scripts = (never, never)
    mesh_ = running_mesh(tmp_path, implementation=implementation, scripts=scripts)
    async with mesh_ as mesh, AsyncClient(mesh.endpoint, retries=0) as client:
        request = asyncio.create_task(client.infer("echo", {"x": X}))
        await mesh.until(lambda: any(orchestrator.heads for orchestrator in mesh.orchestrators))
        chosen, other = sorted(mesh.orchestrators, key=lambda orchestrator: not orchestrator.heads)
        other.script = answer
        await chosen.stop()
        assert np.array_equal((await request)["y"], X)
        assert len(chosen.heads) == len(other.heads) == 1


async def test_a_request_waits_for_an_orchestrator_to_come(tmp_path: Path, implementation: str) -> None:
    async with running_mesh(tmp_path, implementation=implementation) as mesh, AsyncClient(mesh.endpoint, retries=0) as client:
        await mesh.orchestrators[0].stop()
        await mesh.until(lambda: not mesh.is_ready)
        assert mesh.context.readiness == "no orchestrator is connected to this gateway"
        assert not await client.is_ready()
        request = asyncio.create_task(client.infer("echo", {"x": X}))
        successor = ScriptedOrchestrator("successor")
        try:
            await successor.start(mesh.registry, implementation)
            assert np.array_equal((await request)["y"], X)
            assert mesh.is_ready
            assert await client.is_ready()
        finally:
            await successor.stop()


async def test_without_any_orchestrator_the_caller_learns_it_in_bounded_time(tmp_path: Path, implementation: str) -> None:
    settings: dict[str, object] = {"orchestrator_wait_s": 0.05}
    async with running_mesh(tmp_path, implementation=implementation, scripts=(), settings=settings) as mesh:
        await mesh.until(lambda: mesh.gateway._catalog is not None and "echo" in mesh.gateway._catalog.models)
        async with AsyncClient(mesh.endpoint, retries=0) as client:
            with pytest.raises(Unavailable, match=r"no orchestrator is connected to this gateway; waited 0\.05 s"):
                await client.infer("echo", {"x": X})


async def test_a_client_that_cancels_cancels_at_the_orchestrator(tmp_path: Path, implementation: str) -> None:
    async with running_mesh(tmp_path, implementation=implementation, scripts=(never,)) as mesh, AsyncClient(mesh.endpoint) as client:
        request = asyncio.create_task(client.infer("echo", {"x": X}))
        orchestrator = mesh.orchestrators[0]
        await orchestrator.arrived.wait()
        request.cancel()
        await orchestrator.cancelled.wait()
        assert orchestrator.num_cancelled == 1
        await mesh.until(lambda: _in_flight(mesh.context.metrics.collect) == 0)


async def test_a_deadline_is_carried_and_cancels_at_the_orchestrator(tmp_path: Path, implementation: str) -> None:
    seen: list[float] = []

    def note(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        seen.append(exchange.deadline.remaining_s())

    async with running_mesh(tmp_path, implementation=implementation, scripts=(note,)) as mesh, AsyncClient(mesh.endpoint) as client:
        with pytest.raises(DeadlineExceeded):
            await client.infer("echo", {"x": X}, timeout_s=0.4)
        await mesh.orchestrators[0].cancelled.wait()
        assert 0 < seen[0] < 1  # not the 20 s of the model; the wire rounds up


async def test_the_gateways_own_deadline_names_the_hop(tmp_path: Path, implementation: str) -> None:
    quick = spec("quick", ECHO.signature.inputs, ECHO.signature.outputs)
    settings: dict[str, object] = {"max_timeout_s": 0.1}
    async with running_mesh(tmp_path, implementation=implementation, scripts=(never,), settings=settings, specs=(quick,)) as mesh:
        async with AsyncClient(mesh.endpoint) as client:
            with pytest.raises(DeadlineExceeded, match="orchestrator") as caught:
                await client.infer("quick", {"x": X}, timeout_s=20)
        assert caught.value.hop == "orchestrator"
        await mesh.orchestrators[0].cancelled.wait()


async def test_more_than_fits_is_refused_with_a_time_to_come_back(tmp_path: Path, implementation: str) -> None:
    settings: dict[str, object] = {"max_in_flight_requests": 1}
    mesh_ = running_mesh(tmp_path, implementation=implementation, scripts=(never,), settings=settings)
    async with mesh_ as mesh, AsyncClient(mesh.endpoint, retries=0) as client:
        first = asyncio.create_task(client.infer("echo", {"x": X}))
        await mesh.orchestrators[0].arrived.wait()
        with pytest.raises(Overloaded, match="1 requests in flight") as caught:
            await client.infer("echo", {"x": X})
        assert caught.value.retry_after_s > 0
        first.cancel()
        await mesh.orchestrators[0].cancelled.wait()
        mesh.orchestrators[0].script = answer
        assert np.array_equal((await client.infer("echo", {"x": X}))["y"], X)


async def test_the_wanted_revision_serves_and_others_can_be_named(tmp_path: Path, implementation: str) -> None:
    async with running_mesh(tmp_path, implementation=implementation, specs=(ECHO, MIXED)) as mesh, AsyncClient(mesh.endpoint) as client:
        newer = spec("echo", ECHO.signature.inputs, ECHO.signature.outputs, revision="ab" * 32, version="2")
        await mesh.serve(newer, replicas=3)
        await mesh.until(lambda: _serving(mesh, "echo") == newer.revision)
        assert (await client.infer("echo", {"x": X})).revision == newer.revision
        assert (await client.infer("echo", {"x": X}, revision=ECHO.revision[:8])).revision == ECHO.revision
        model = await client.model("echo")
        assert (model.revision, model.version, model.num_replicas, model.num_ready_replicas) == (newer.revision, "2", 3, 1)
        await want(mesh.registry, ECHO)
        await mesh.until(lambda: _serving(mesh, "echo") == ECHO.revision)


async def test_models_and_topology_are_told(tmp_path: Path, implementation: str) -> None:
    async with running_mesh(tmp_path, implementation=implementation) as mesh, AsyncClient(mesh.endpoint) as client:
        models = {model.name: model for model in await client.models()}
        assert list(models) == ["brain", "echo", "mixed", "words"]
        assert models["echo"].is_ready
        assert models["echo"].inputs == ECHO.signature.inputs
        assert (models["echo"].max_rows, models["mixed"].max_rows) == (8, 0)
        assert models["mixed"].inputs[2].dtype is DataType.BOOL
        members = await client.topology()
        assert {member.kind for member in members} == {"orchestrator", "group"}
        with pytest.raises(NotFound, match="models known: brain, echo"):
            await client.model("nope")


async def test_metrics_count_by_model_and_status(tmp_path: Path, implementation: str) -> None:
    async with running_mesh(tmp_path, implementation=implementation) as mesh, AsyncClient(mesh.endpoint) as client:
        await client.infer("echo", {"x": X})
        for model, inputs in (("echo", {"x": [["a"]]}), ("nope", {"x": X})):
            with pytest.raises(TensorwayError):
                await client.infer(model, inputs)
        value = mesh.context.metrics.get_sample_value
        assert value("tensorway_gateway_requests_total", {"model": "echo", "code": "OK"}) == 1
        assert value("tensorway_gateway_requests_total", {"model": "echo", "code": "INVALID_ARGUMENT"}) == 1
        assert value("tensorway_gateway_requests_total", {"model": "", "code": "NOT_FOUND"}) == 1
        assert value("tensorway_gateway_request_duration_seconds_count", {"model": "echo"}) == 2
        assert value("tensorway_gateway_received_bytes_total", {"model": "echo"}) == X.nbytes + 5
        assert value("tensorway_gateway_in_flight_requests") == 0


def _serving(mesh: object, name: str) -> str:
    catalog = mesh.gateway._catalog  # type: ignore[attr-defined]
    return str(catalog.models[name].serving.spec.revision)


def _in_flight(collect: Callable[[], object]) -> float:
    for metric in collect():  # type: ignore[attr-defined]
        if metric.name == "tensorway_gateway_in_flight_requests":
            return float(metric.samples[0].value)
    raise AssertionError("the metric is missing")

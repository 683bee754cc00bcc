"""The Open Inference Protocol v2 over real gRPC, with messages of its own package."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tensorway import __version__
from tensorway.compat import grpc_service_pb2 as oip
from tensorway.compat import model_config_pb2 as config
from tensorway.errors import InvalidRequest, NotFound, TensorwayError, Unimplemented
from tensorway.registry.port import NODES, Registration
from tensorway.tensors import encode_bytes
from tensorway.transport import AsyncChannel
from tests.contract.gateway.scripted import ECHO, SPECS, Mesh, publish, running_mesh, spec, want

Request = oip.ModelInferRequest
Input = Request.InferInputTensor
_SERVICE = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"]
FLOATS = struct.pack("<4f", 1, 2, 3, 4)


class Caller:
    """Calls any unary RPC of the service by its name."""

    def __init__(self, mesh: Mesh, channel: AsyncChannel) -> None:
        self.mesh = mesh
        self._channel = channel
        self.trailers: dict[str, Any] = {}

    async def __call__(self, rpc: str, request: Any = None) -> Any:
        method = _SERVICE.methods_by_name[rpc]
        message = getattr(oip, method.input_type.name)() if request is None else request
        reply = await self._channel.unary(f"/{_SERVICE.full_name}/{rpc}", message.SerializeToString(), 10.0)
        self.trailers = dict(reply.trailers)
        return getattr(oip, method.output_type.name).FromString(reply.response)

    @property
    def heads(self) -> Any:
        return self.mesh.orchestrators[0].heads


@asynccontextmanager
async def calling(tmp_path: Path, **options: Any) -> AsyncIterator[Caller]:
    async with running_mesh(tmp_path, **options) as mesh:
        channel = AsyncChannel(mesh.endpoint)
        try:
            yield Caller(mesh, channel)
        finally:
            await channel.close()


def echo(**changes: Any) -> Request:
    given = {"model_name": "echo", "inputs": [Input(name="x", datatype="FP32", shape=[2, 2])], "raw_input_contents": [FLOATS], **changes}
    return Request(**given)


async def test_the_server_describes_itself_truthfully(tmp_path: Path) -> None:
    async with calling(tmp_path) as call:
        assert (await call("ServerLive")).live
        assert (await call("ServerReady")).ready
        metadata = await call("ServerMetadata")
        assert (metadata.name, metadata.version) == ("tensorway", __version__)
        assert "statistics" in metadata.extensions
        assert not {"system_shared_memory", "model_repository", "sequence", "trace"} & set(metadata.extensions)


async def test_raw_and_typed_contents_give_the_same(tmp_path: Path) -> None:
    async with calling(tmp_path) as call:
        raw = await call("ModelInfer", echo(id="me"))
        typed_input = Input(name="x", datatype="FP32", shape=[2, 2], contents=oip.InferTensorContents(fp32_contents=[1, 2, 3, 4]))
        typed = await call("ModelInfer", Request(model_name="echo", inputs=[typed_input]))
        for response in (raw, typed):
            assert (response.model_name, response.model_version) == ("echo", "1")
            assert [(item.name, item.datatype, list(item.shape)) for item in response.outputs] == [("y", "FP32", [2, 2])]
            assert list(response.raw_output_contents) == [FLOATS]
        assert (raw.id, typed.id) == ("me", "")
        assert [head.request_id == "me" for head in call.heads] == [True, False]
        assert "tensorway-timing" in call.trailers


@pytest.mark.parametrize(
    ("datatype", "field", "values", "raw"),
    [
        ("BOOL", "bool_contents", [True, False], b"\x01\x00"),
        ("INT8", "int_contents", [-128, 127], b"\x80\x7f"),
        ("INT16", "int_contents", [-2, 1], b"\xfe\xff\x01\x00"),
        ("INT32", "int_contents", [-2, 1], struct.pack("<2i", -2, 1)),
        ("INT64", "int64_contents", [-(2**40), 1], struct.pack("<2q", -(2**40), 1)),
        ("UINT8", "uint_contents", [0, 255], b"\x00\xff"),
        ("UINT16", "uint_contents", [1, 65535], b"\x01\x00\xff\xff"),
        ("UINT32", "uint_contents", [1, 2**32 - 1], struct.pack("<2I", 1, 2**32 - 1)),
        ("UINT64", "uint64_contents", [1, 2**64 - 1], struct.pack("<2Q", 1, 2**64 - 1)),
        ("FP32", "fp32_contents", [0.5, -1.0], struct.pack("<2f", 0.5, -1)),
        ("FP64", "fp64_contents", [0.1, -1.0], struct.pack("<2d", 0.1, -1)),
        ("BYTES", "bytes_contents", [b"ab", b""], encode_bytes([b"ab", b""])),
    ],
)
async def test_every_typed_list_becomes_the_wires_bytes(tmp_path: Path, datatype: str, field: str, values: list[Any], raw: bytes) -> None:
    from tensorway.signature import TensorSpec
    from tensorway.tensors import DataType
    from tests.contract.gateway import scripted

    dtype = DataType[datatype]
    own = spec("own", (TensorSpec("x", dtype, ("rows",)),), (TensorSpec("y", dtype, ("rows",)),))

    def script(exchange: Any, head: Any) -> None:
        exchange.reply(*scripted.echo_reply(head, exchange.payload, (own,)))

    async with calling(tmp_path, specs=(own,), scripts=(script,)) as call:
        contents = oip.InferTensorContents(**{field: values})
        given = Input(name="x", datatype=datatype, shape=[2], contents=contents)
        response = await call("ModelInfer", Request(model_name="own", inputs=[given]))
        assert response.raw_output_contents[0] == raw
        assert response.outputs[0].datatype == datatype
        # What asks for no raw bytes gets the list back, and nothing else.
        wish = {"binary_data_output": oip.InferParameter(bool_param=False)}
        response = await call("ModelInfer", Request(model_name="own", inputs=[given], parameters=wish))
        assert not response.raw_output_contents
        assert [field.name for field, _ in response.outputs[0].contents.ListFields()] == [contents.ListFields()[0][0].name]
        assert list(getattr(response.outputs[0].contents, field)) == values


async def test_halves_have_no_typed_contents(tmp_path: Path) -> None:
    from tensorway.signature import TensorSpec
    from tensorway.tensors import DataType
    from tests.contract.gateway import scripted

    own = spec("own", (TensorSpec("x", DataType.FP16, ("rows",)),), (TensorSpec("y", DataType.FP16, ("rows",)),))

    def script(exchange: Any, head: Any) -> None:
        exchange.reply(*scripted.echo_reply(head, exchange.payload, (own,)))

    wish = {"binary_data_output": oip.InferParameter(bool_param=False)}
    given = [Input(name="x", datatype="FP16", shape=[1])]
    async with calling(tmp_path, specs=(own,), scripts=(script,)) as call:
        with pytest.raises(InvalidRequest, match="output 'y' is FP16, which has no typed contents"):
            await call("ModelInfer", Request(model_name="own", inputs=given, raw_input_contents=[b"00"], parameters=wish))


@pytest.mark.parametrize(
    ("request_", "kind", "says"),
    [
        (echo(model_name="nope"), NotFound, "model 'nope' is unknown here"),
        (echo(model_version="9"), NotFound, "no revision '9' that serves; there are: 6563686f0000 (version 1)"),
        (echo(raw_input_contents=[FLOATS, FLOATS]), InvalidRequest, "has 2 entries for 1 inputs"),
        (echo(raw_input_contents=[FLOATS[:-1]]), InvalidRequest, "input 'x' data: FP32 of shape [2, 2] needs 16 bytes, got 15"),
        (echo(raw_input_contents=[]), InvalidRequest, "needs 16 bytes, got 0"),
        (
            echo(inputs=[Input(name="x", datatype="FP32", shape=[2, 2], contents=oip.InferTensorContents(fp32_contents=[1]))]),
            InvalidRequest, "use one of the two",
        ),
        (echo(inputs=[Input(name="x", datatype="FP99", shape=[2, 2])]), InvalidRequest, "datatype 'FP99' is not one of"),
        (echo(outputs=[Request.InferRequestedOutputTensor(name="q")]), InvalidRequest, "has no output 'q'"),
        (echo(parameters={"sequence_id": oip.InferParameter(int64_param=4)}), InvalidRequest, "sequences are not served"),
        (echo(parameters={"timeout": oip.InferParameter(int64_param=-4)}), InvalidRequest, "whole number of at least 0"),
        (echo(parameters={"priority": oip.InferParameter(string_param="high")}), InvalidRequest, "whole number of at least 0"),
        (echo(parameters={"own": oip.InferParameter()}), InvalidRequest, "has no value"),
        (echo(parameters={"own": oip.InferParameter(uint64_param=2**63)}), InvalidRequest, "is more than"),
        (
            echo(inputs=[Input(name="x", datatype="FP32", parameters={"shared_memory_region": oip.InferParameter(string_param="r")})]),
            Unimplemented, "shared memory is not served here",
        ),
        (
            echo(outputs=[Request.InferRequestedOutputTensor(name="y", parameters={"classification": oip.InferParameter(int64_param=3)})]),
            Unimplemented, "classification is not served here",
        ),
    ],
)
async def test_what_is_wrong_is_named_and_goes_no_further(tmp_path: Path, request_: Request, kind: type[TensorwayError], says: str) -> None:
    async with calling(tmp_path) as call:
        with pytest.raises(kind, match=re.escape(says)):
            await call("ModelInfer", request_)
        assert call.heads == []


@pytest.mark.parametrize(
    ("datatype", "contents", "says"),
    [
        ("INT8", {"int_contents": [128]}, "does not fit INT8"),
        ("UINT8", {"uint_contents": [256]}, "does not fit UINT8"),
        ("INT8", {"uint_contents": [1]}, "INT8 belongs in int_contents, got uint_contents"),
        ("INT8", {"int_contents": [1, 2]}, "shape [1] has 1 elements, int_contents has 2"),
        ("FP16", {"fp32_contents": [1]}, "FP16 has no typed contents"),
        ("BF16", {"fp32_contents": [1]}, "BF16 has no typed contents"),
    ],
)
async def test_typed_contents_that_do_not_fit(tmp_path: Path, datatype: str, contents: dict[str, Any], says: str) -> None:
    async with calling(tmp_path) as call:
        given = Input(name="b", datatype=datatype, shape=[1], contents=oip.InferTensorContents(**contents))
        with pytest.raises(InvalidRequest, match=re.escape(says)):
            await call("ModelInfer", Request(model_name="mixed", inputs=[given]))


async def test_parameters_that_steer_and_parameters_for_the_model(tmp_path: Path) -> None:
    seen: list[float] = []

    def script(exchange: Any, head: Any) -> None:
        from tests.contract.gateway.scripted import answer

        seen.append(exchange.deadline.remaining_s())
        answer(exchange, head)

    parameter = oip.InferParameter
    async with calling(tmp_path, scripts=(script,)) as call:
        response = await call("ModelInfer", echo(parameters={
            "priority": parameter(uint64_param=1), "timeout": parameter(int64_param=3_000_000), "own": parameter(string_param="v"),
            "sequence_id": parameter(int64_param=0), "triton_enable_empty_final_response": parameter(bool_param=True),
        }))
        assert {name: value.string_param for name, value in response.parameters.items()} == {"own": "v"}
        assert call.heads[0].priority == 100
        assert 0 < seen[0] <= 3.0
        for level, expected in ((0, 0), (2, 99), (101, 0), (201, -100), (5000, -100)):
            await call("ModelInfer", echo(parameters={"priority": parameter(int64_param=level)}))
            assert call.heads[-1].priority == expected


async def test_versions_are_labels_or_prefixes(tmp_path: Path) -> None:
    async with calling(tmp_path) as call:
        for version in ("", "1", ECHO.revision[:8], ECHO.revision):
            assert (await call("ModelInfer", echo(model_version=version))).model_version == "1"
            assert (await call("ModelReady", oip.ModelReadyRequest(name="echo", version=version))).ready


async def test_metadata_and_config_tell_the_signature(tmp_path: Path) -> None:
    async with calling(tmp_path) as call:
        metadata = await call("ModelMetadata", oip.ModelMetadataRequest(name="mixed"))
        assert (metadata.name, list(metadata.versions), metadata.platform) == ("mixed", ["1"], "pytorch_python")
        assert [(item.name, item.datatype, list(item.shape)) for item in metadata.inputs] == [
            ("a", "INT64", [-1, 2]), ("b", "INT8", [-1]), ("flag", "BOOL", []),
        ]
        batched = (await call("ModelConfig", oip.ModelConfigRequest(name="echo"))).config
        assert (batched.max_batch_size, list(batched.input[0].dims), batched.input[0].data_type) == (8, [-1], config.TYPE_FP32)
        assert batched.dynamic_batching.max_queue_delay_microseconds == 2000
        assert batched.parameters["revision"].string_value == ECHO.revision
        alone = (await call("ModelConfig", oip.ModelConfigRequest(name="mixed"))).config
        assert (alone.max_batch_size, list(alone.input[0].dims)) == (0, [-1, 2])
        assert not alone.HasField("dynamic_batching")


async def test_statistics_count_rows_steps_and_times(tmp_path: Path) -> None:
    async with calling(tmp_path) as call:
        for _ in range(3):
            await call("ModelInfer", echo())
        with pytest.raises(InvalidRequest):
            await call("ModelInfer", echo(raw_input_contents=[b""]))
        (stats,) = (await call("ModelStatistics", oip.ModelStatisticsRequest(name="echo"))).model_stats
        assert (stats.name, stats.version, stats.inference_count, stats.execution_count) == ("echo", "1", 6, 3)
        assert stats.last_inference > 0
        inference = stats.inference_stats
        assert (inference.success.count, inference.fail.count) == (3, 1)
        assert inference.success.ns > 0
        assert (inference.queue.ns, inference.compute_infer.ns, inference.compute_input.ns) == (3 * 18_000, 3 * 50_000, 3 * 5_000)
        (batch,) = stats.batch_stats
        assert (batch.batch_size, batch.compute_infer.count, batch.compute_infer.ns) == (2, 3, 150_000)
        assert len((await call("ModelStatistics")).model_stats) == len(SPECS)


async def test_the_index_tells_state_and_reason(tmp_path: Path) -> None:
    async with calling(tmp_path) as call:
        cold = spec("cold", ECHO.signature.inputs, ECHO.signature.outputs)
        registry = call.mesh.registry
        await registry.register(Registration("node", "n", "127.0.0.1:1"))
        group = {"model": "cold", "revision": cold.revision, "state": "backing_off", "reason": "no memory"}
        await registry.write(f"{NODES}n", json.dumps({"node": "n", "groups": [group]}).encode())
        await publish(registry, cold)
        await want(registry, cold)
        catalog = call.mesh.gateway._catalog
        assert catalog is not None
        await call.mesh.until(lambda: "cold" in catalog.models and catalog.models["cold"].serving.reason == "no memory")
        index = {item.name: item for item in (await call("RepositoryIndex")).models}
        assert (index["cold"].state, index["cold"].reason) == ("UNAVAILABLE", "no memory")
        assert (index["echo"].state, index["echo"].version) == ("READY", "1")
        ready = await call("RepositoryIndex", oip.RepositoryIndexRequest(ready=True))
        assert "cold" not in {item.name for item in ready.models}
        assert not (await call("ModelReady", oip.ModelReadyRequest(name="cold"))).ready
        with pytest.raises(NotFound):
            await call("ModelReady", oip.ModelReadyRequest(name="colder"))
        with pytest.raises(NotFound):
            await call("RepositoryIndex", oip.RepositoryIndexRequest(repository_name="elsewhere"))


async def test_what_is_not_served_says_what_to_use(tmp_path: Path) -> None:
    async with calling(tmp_path) as call:
        for rpc, says in (
            ("RepositoryModelLoad", "--models-dir"), ("SystemSharedMemoryRegister", "in the message"),
            ("CudaSharedMemoryStatus", "in the message"),
            ("TraceSetting", "tensorway-timing"), ("LogSettings", "--log-level"),
        ):
            with pytest.raises(Unimplemented, match=re.escape(says)):
                await call(rpc)


async def test_without_an_orchestrator_nothing_is_ready(tmp_path: Path) -> None:
    async with calling(tmp_path) as call:
        await call.mesh.orchestrators[0].stop()
        await call.mesh.until(lambda: not call.mesh.is_ready)
        assert (await call("ServerLive")).live
        assert not (await call("ServerReady")).ready
        assert not (await call("ModelReady", oip.ModelReadyRequest(name="echo"))).ready

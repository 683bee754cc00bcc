"""Health and reflection as real tools see them: grpc_health's stub, and grpcurl."""

from __future__ import annotations

import asyncio
import json
import sysconfig
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from tensorway.errors import Unavailable
from tensorway.transport import HealthService, add_reflection, check_health
from tensorway.transport.port import Server
from tensorway.v1 import inference_pb2

from .conftest import TIMEOUT_S, Rig, soon

_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name


GRPCURL = str(Path(sysconfig.get_path("scripts")) / "grpcurl")


async def _grpcurl(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        GRPCURL, "-plaintext", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_check(rig: Rig) -> None:
    health = HealthService(("a.Service",))
    endpoint = await rig.serve(prepare=health.attach)
    assert await check_health(endpoint, "", TIMEOUT_S) == "NOT_SERVING"
    health.set("", True)
    health.set("a.Service", True)
    assert await check_health(endpoint, "", TIMEOUT_S) == "SERVING"
    assert await check_health(endpoint, "a.Service", TIMEOUT_S) == "SERVING"
    assert await check_health(endpoint, "b.Service", TIMEOUT_S) == "SERVICE_UNKNOWN"
    stub = HealthStub(rig.grpc_channel(endpoint))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Check(HealthCheckRequest(service="b.Service"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    health.shutdown()
    health.set("a.Service", True)
    assert await check_health(endpoint, "a.Service", TIMEOUT_S) == "NOT_SERVING"


async def test_nobody_there_is_unavailable() -> None:
    with pytest.raises(Unavailable):
        await check_health("127.0.0.1:1", "", TIMEOUT_S)


async def test_watch_streams_every_change_until_shutdown(rig: Rig) -> None:
    health = HealthService(("a.Service",))
    stub = HealthStub(rig.grpc_channel(await rig.serve(prepare=health.attach)))
    watch = stub.Watch(HealthCheckRequest(service="a.Service"))
    unknown = stub.Watch(HealthCheckRequest(service="new.Service"))

    async def seen(call: Any) -> str:
        response = await asyncio.wait_for(call.read(), TIMEOUT_S)
        return "end" if response is grpc.aio.EOF else HealthCheckResponse.ServingStatus.Name(response.status)

    assert await seen(watch) == "NOT_SERVING"
    assert await seen(unknown) == "SERVICE_UNKNOWN"
    health.set("a.Service", True)
    health.set("a.Service", True)
    assert await seen(watch) == "SERVING"
    health.set("new.Service", True)
    assert await seen(unknown) == "SERVING"
    health.shutdown()
    assert await seen(watch) == "NOT_SERVING"
    assert await seen(watch) == "end"
    assert await watch.code() is grpc.StatusCode.OK
    assert await seen(unknown) == "NOT_SERVING"
    await soon(rig.servers[0].stop(TIMEOUT_S))


async def test_grpcurl_lists_describes_and_calls(rig: Rig) -> None:
    health = HealthService()
    health.set("", True)

    def prepare(server: Server) -> None:
        health.attach(server)
        add_reflection(server, (_SERVICE, "grpc.health.v1.Health"))

    endpoint = await rig.serve(prepare=prepare)
    code, listed = await _grpcurl(endpoint, "list")
    assert code == 0, listed
    assert {_SERVICE, "grpc.health.v1.Health"} <= set(listed.split())
    code, described = await _grpcurl(endpoint, "describe", "tensorway.v1.InferRequest")
    assert code == 0, described
    assert ".tensorway.v1.Tensor inputs = 4" in described
    code, answer = await _grpcurl(endpoint, "grpc.health.v1.Health/Check")
    assert code == 0, answer
    assert json.loads(answer) == {"status": "SERVING"}
    code, missing = await _grpcurl(endpoint, "describe", "no.Such")
    assert code != 0
    assert "not found" in missing.lower()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_both_versions_of_reflection_answer(rig: Rig, version: str) -> None:
    from grpc_reflection.v1alpha.reflection_pb2 import ExtensionRequest, ServerReflectionRequest, ServerReflectionResponse

    endpoint = await rig.serve(prepare=lambda server: add_reflection(server, (_SERVICE,)))
    call = rig.grpc_channel(endpoint).stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=ServerReflectionRequest.SerializeToString,
        response_deserializer=ServerReflectionResponse.FromString,
    )()

    async def ask(**question: object) -> Any:
        await call.write(ServerReflectionRequest(**question))
        return await call.read()

    listed = await ask(list_services="*")
    assert _SERVICE in [service.name for service in listed.list_services_response.service]
    by_name = await ask(file_by_filename="tensorway/v1/inference.proto")
    by_symbol = await ask(file_containing_symbol=f"{_SERVICE}.Infer")
    files = by_name.file_descriptor_response.file_descriptor_proto
    assert {descriptor_pb2.FileDescriptorProto.FromString(file).name for file in files} == {
        "tensorway/v1/inference.proto", "tensorway/v1/tensor.proto", "google/api/annotations.proto", "google/api/http.proto",
        "google/protobuf/descriptor.proto",
    }
    assert by_symbol.file_descriptor_response.file_descriptor_proto == files
    assert (await ask(file_containing_symbol="no.Such")).error_response.error_code == 5
    options = descriptor_pb2.MethodOptions.DESCRIPTOR.full_name
    extension = ExtensionRequest(containing_type=options, extension_number=1)
    assert (await ask(file_containing_extension=extension)).error_response.error_code == 5
    numbers = await ask(all_extension_numbers_of_type=options)
    assert numbers.all_extension_numbers_response.base_type_name == options
    assert (await ask()).error_response.error_code == 3

"""Who may do what through every dialect of a real gateway, over real connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import yaml
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest

from tensorway.access.api_keys import key_hash, new_key
from tensorway.client import AsyncClient
from tensorway.compat import grpc_service_pb2 as oip
from tensorway.errors import Overloaded
from tensorway.tensors import DataType, encode_bytes
from tensorway.transport.port import Exchange
from tensorway.v1 import inference_pb2, link_pb2, mesh_pb2, model_pb2
from tensorway_gateway.identity.guarded import GuardedServer
from tensorway_gateway.identity.methods import RULES, Scope
from tests.contract.gateway.identities import AccessFile, call, issuer_rule, token, write_key_set
from tests.contract.gateway.scripted import SPECS, Mesh, answer, echo_reply, running_mesh
from tests.contract.gateway.streaming import TALKER, answer_of, talk

pytestmark = pytest.mark.asyncio(loop_scope="module")
V1 = "/tensorway.v1."
OIP = "/inference.GRPCInferenceService/"
INFER = f"{V1}InferenceService/Infer"
GENERATE = f"{V1}InferenceService/Generate"
STREAM_INFER = f"{OIP}ModelStreamInfer"


@dataclass(slots=True)
class World:
    """A mesh behind an access file, and a connection to it."""

    mesh: Mesh
    access: AccessFile
    channel: grpc.aio.Channel
    audit: Path

    def key(self, name: str) -> str:
        return self.access.keys[name]

    async def call(self, method: str, message: bytes, who: str = "", **more: tuple[tuple[str, str], ...]) -> tuple[str, bytes, str]:
        return await call(self.channel, method, message, self.access.keys.get(who, who), **more)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("identity")
    access = AccessFile(folder)
    access.add("echo-user", "infer:echo", "explain:echo")
    access.add("words-user", "infer:words")
    access.add("talker", "infer:talker")
    access.add("other-talker", "infer:talker")
    access.add("operator", "manage", "observe")
    access.add("echo-operator", "manage:echo", "observe:echo")
    access.add("root", "infer", "explain", "manage", "observe")
    write_key_set(folder / "jwks.json")
    audit = folder / "audit.jsonl"
    settings: dict[str, object] = {"access_file": str(access.write(issuers=[issuer_rule()])), "audit_file": str(audit)}

    def script(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        if head.HasField("generate"):
            talk(3)(exchange, head)
        elif head.model == TALKER.model:
            exchange.reply(*echo_reply(head, exchange.payload, (TALKER,)))
        else:
            answer(exchange, head)

    running = running_mesh(folder, scripts=(script,), settings=settings, specs=(*SPECS, TALKER))
    async with running as mesh, grpc.aio.insecure_channel(mesh.endpoint) as channel:
        yield World(mesh, access, channel, audit)


def infer(model: str, **more: object) -> bytes:
    request = inference_pb2.InferRequest(model=model, **more)  # type: ignore[arg-type]
    if model == "words":
        request.inputs.add(name="text", dtype=DataType.BYTES, shape=[1], data=encode_bytes([b"hi"]))  # type: ignore[arg-type]
    else:
        request.inputs.add(name="x", dtype=DataType.FP32, shape=[1, 2], data=bytes(8))  # type: ignore[arg-type]
    return request.SerializeToString()


def oip_infer(model: str) -> bytes:
    request = oip.ModelInferRequest(model_name=model, id="mine", raw_input_contents=[bytes(8)])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    return request.SerializeToString()


def messages(model: str) -> dict[str, bytes]:
    """A message about `model` for each method whose permission depends on it."""
    return {
        INFER: infer(model),
        f"{V1}InferenceService/Explain": inference_pb2.ExplainRequest(model=model).SerializeToString(),
        GENERATE: inference_pb2.GenerateRequest(model=model, text="hello").SerializeToString(),
        f"{V1}ModelService/GetModel": model_pb2.GetModelRequest(name=model).SerializeToString(),
        f"{V1}ModelService/ScaleModel": model_pb2.ScaleModelRequest(model=model, replicas=1).SerializeToString(),
        f"{V1}MeshService/GetLoad": mesh_pb2.GetLoadRequest(model=model).SerializeToString(),
        f"{V1}MeshService/Profile": mesh_pb2.ProfileRequest(model=model).SerializeToString(),
        f"{OIP}ModelInfer": oip_infer(model),
        STREAM_INFER: oip_infer(model),
        f"{OIP}ModelReady": oip.ModelReadyRequest(name=model).SerializeToString(),
        f"{OIP}ModelMetadata": oip.ModelMetadataRequest(name=model).SerializeToString(),
        f"{OIP}ModelConfig": oip.ModelConfigRequest(name=model).SerializeToString(),
        f"{OIP}ModelStatistics": oip.ModelStatisticsRequest(name=model).SerializeToString(),
        f"{OIP}RepositoryModelLoad": oip.RepositoryModelLoadRequest(model_name=model).SerializeToString(),
        f"{OIP}RepositoryModelUnload": oip.RepositoryModelUnloadRequest(model_name=model).SerializeToString(),
    }


def registered(mesh: Mesh) -> set[str]:
    """Every method that the gateway's real server answers."""
    server: Any = mesh.context.server
    assert isinstance(server, GuardedServer)
    server = server._server
    routes = getattr(server, "_routes", None) or server.routes
    return {*routes.unary, *routes.streams}


async def test_every_route_is_in_the_table_and_open_or_closed_to_strangers(world: World) -> None:
    routes = registered(world.mesh)
    assert routes <= RULES.keys(), f"no rule for {routes - RULES.keys()}"
    assert len(routes) >= 30
    for method in sorted(routes):
        is_open = RULES[method].scope is Scope.OPEN
        status, _, sentence = await world.call(method, messages("echo").get(method, b""))
        assert (status == "OK") is is_open, f"{method}: {status} {sentence}"
        if not is_open:
            assert status == "UNAUTHENTICATED"
            assert "no credential was sent" in sentence
    assert {method for method in routes if RULES[method].scope is Scope.OPEN} == {
        "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", f"{OIP}ServerLive", f"{OIP}ServerReady",
    }


async def test_every_method_that_names_a_model_refuses_the_models_of_others(world: World) -> None:
    """Each key is asked for a model that is another's, and for one that does not exist: both sound the same."""
    about = messages("echo")
    for method in registered(world.mesh):
        if RULES[method].scope in (Scope.PATH, Scope.MODEL) or RULES[method].message is not None:
            assert method in about, f"{method} names a model: give it a message in `messages`"
    for method in sorted(about.keys() & registered(world.mesh)):
        for model in ("mixed", "no-such-model"):
            for who in ("words-user", "echo-operator"):
                status, first, sentence = await world.call(method, messages(model)[method], who)
                if method == STREAM_INFER and status == "OK":
                    sentence = oip.ModelStreamInferResponse.FromString(first).error_message
                    status = "PERMISSION_DENIED" if sentence else "OK"
                assert status == "PERMISSION_DENIED", f"{method} of {model} by {who}: {status} {sentence}"
                assert f"key:{who} may not" in sentence
                assert "brain" not in sentence, "names of models leak"


async def test_a_method_of_the_whole_mesh_takes_permission_for_all_of_it(world: World) -> None:
    closed = [method for method in sorted(registered(world.mesh)) if RULES[method].scope is Scope.MESH]
    assert f"{V1}MeshService/GetTopology" in closed
    for method in closed:
        for who in ("echo-operator", "echo-user"):
            status, _, sentence = await world.call(method, b"", who)
            assert status == "PERMISSION_DENIED", f"{method}: {status} {sentence}"
        status, _, _ = await world.call(method, b"", "operator")
        assert status in ("OK", "UNIMPLEMENTED", "INVALID_ARGUMENT"), method


async def test_what_is_allowed_works(world: World) -> None:
    for method, message in messages("echo").items():
        if method in registered(world.mesh) and not method.endswith(("Generate", "Profile", "Load", "Unload", "Explain")):
            status, _, sentence = await world.call(method, message, "root")
            assert status == "OK", f"{method}: {sentence}"
    # The forms of a credential.
    key = world.key("echo-user")
    for metadata in ((("x-api-key", key),), (("authorization", f"bearer {key}"),), (("authorization", f"Bearer {token()}"),)):
        assert (await world.call(INFER, infer("echo"), metadata=metadata))[0] == "OK"
    # Who may only infer may see what it infers with, which every client asks first.
    status, message, _ = await world.call(f"{V1}ModelService/GetModel", messages("echo")[f"{V1}ModelService/GetModel"], "echo-user")
    assert status == "OK"
    assert model_pb2.GetModelResponse.FromString(message).model.name == "echo"


async def test_lists_hold_what_the_caller_sees(world: World) -> None:
    listed = model_pb2.ListModelsResponse.FromString((await world.call(f"{V1}ModelService/ListModels", b"", "words-user"))[1])
    assert [model.name for model in listed.models] == ["words"]
    index = oip.RepositoryIndexResponse.FromString((await world.call(f"{OIP}RepositoryIndex", b"", "words-user"))[1])
    assert [model.name for model in index.models] == ["words"]
    loads = mesh_pb2.GetLoadResponse.FromString((await world.call(f"{V1}MeshService/GetLoad", b"", "echo-operator"))[1])
    assert [load.model for load in loads.loads] == ["echo"]
    statistics = oip.ModelStatisticsResponse.FromString((await world.call(f"{OIP}ModelStatistics", b"", "echo-operator"))[1])
    assert {item.name for item in statistics.model_stats} == {"echo"}
    everything = model_pb2.ListModelsResponse.FromString((await world.call(f"{V1}ModelService/ListModels", b"", "root"))[1])
    assert len(everything.models) == len(SPECS) + 1
    # Health and reflection.
    assert (await world.call("/grpc.health.v1.Health/Check", HealthCheckRequest().SerializeToString()))[0] == "OK"
    question = ServerReflectionRequest(list_services="").SerializeToString()
    assert (await world.call("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", question, "echo-user"))[0] == "OK"


async def test_an_unknown_model_is_told_without_the_names_of_others(world: World) -> None:
    world.access.add("nobody-home", "infer:absent", "infer:echo")
    world.access.write()
    await until_known(world, "nobody-home")
    status, _, sentence = await world.call(INFER, infer("absent"), "nobody-home")
    assert status == "NOT_FOUND"
    assert "models known: echo" in sentence
    assert "words" not in sentence


async def until_known(world: World, who: str, status: str = "UNAUTHENTICATED") -> None:
    """Returns once the gateway answers `who` otherwise than by `status`; the test's own timeout ends a wait in vain."""
    while (await world.call(f"{OIP}ServerMetadata", b"", who))[0] == status:
        await asyncio.sleep(0.01)


async def test_each_request_on_one_stream_is_checked(world: World) -> None:
    stream = world.channel.stream_stream(STREAM_INFER)(metadata=(("x-api-key", world.key("echo-user")),), timeout=20.0)
    said = []
    for model in ("echo", "mixed", "echo", "talker"):
        await stream.write(oip_infer(model))
        said.append(oip.ModelStreamInferResponse.FromString(await stream.read()).error_message)
    await stream.done_writing()
    stream.cancel()
    assert [bool(text) for text in said] == [False, True, False, True]
    assert "may not infer model 'mixed'" in said[1]
    assert "may not infer model 'talker'" in said[3]


async def test_an_open_stream_ends_with_its_credential(world: World) -> None:
    key = world.access.add("streaming", "infer:echo")
    world.access.write()
    await until_known(world, "streaming")
    stream = world.channel.stream_stream(STREAM_INFER)(metadata=(("x-api-key", key),), timeout=20.0)
    for _ in range(2):
        await stream.write(oip_infer("echo"))
        assert not oip.ModelStreamInferResponse.FromString(await stream.read()).error_message
    world.access.document["keys"] = [item for item in world.access.document["keys"] if item["name"] != "streaming"]
    world.access.write()
    while (await world.call(f"{OIP}ServerMetadata", b"", key))[0] == "OK":
        await asyncio.sleep(0.01)
    await stream.write(oip_infer("echo"))
    assert await stream.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "revoked" in await stream.details()


async def test_a_stream_is_resumed_by_its_owner_alone(world: World) -> None:
    request = inference_pb2.GenerateRequest(model="talker", text="hello")
    orchestrator = world.mesh.orchestrators[0]
    status, _, sentence = await world.call(GENERATE, request.SerializeToString(), "talker")
    assert status == "OK", sentence
    stream_id = orchestrator.heads[-1].stream_id
    assert stream_id, "the gateway gives streams ids that say whose they are"
    num_heads = len(orchestrator.heads)
    resume = inference_pb2.GenerateRequest(resume=inference_pb2.Resume(stream_id=stream_id, next_sequence=1)).SerializeToString()
    random = stream_id.partition(".")[0]
    forged = inference_pb2.GenerateRequest(resume=inference_pb2.Resume(stream_id=random, next_sequence=1)).SerializeToString()
    for who, message in (("other-talker", resume), ("root", resume), ("talker", forged)):
        status, _, sentence = await world.call(GENERATE, message, who)
        assert status == "NOT_FOUND"
        assert "is not known here" in sentence
    assert len(orchestrator.heads) == num_heads, "no orchestrator was asked"
    status, first, _ = await world.call(GENERATE, resume, "talker")
    assert (status, first) == ("OK", answer_of(3)[0])
    assert orchestrator.heads[-1].generate.resume.stream_id == stream_id
    assert (await world.call(GENERATE, resume, "words-user"))[0] in ("NOT_FOUND", "PERMISSION_DENIED")


async def test_an_idempotency_key_is_its_callers_own(world: World) -> None:
    orchestrator = world.mesh.orchestrators[0]
    told = []
    for who, metadata, message in (
        ("echo-user", (), infer("echo", idempotency_key="k")), ("root", (), infer("echo", idempotency_key="k")),
        ("echo-user", (("idempotency-key", "k"),), infer("echo")), ("echo-user", (), infer("echo")),
        ("echo-user", (), infer("echo", idempotency_key="k" * 256)),
    ):
        assert (await world.call(INFER, message, who, metadata=metadata))[0] == "OK"
        told.append(orchestrator.heads[-1].idempotency_key)
    assert told[0] == told[2] != told[1]
    assert told[0].startswith("k@")
    assert told[3] == ""
    assert len(told[4]) <= 256
    # Writing down another's scoped key does not reach it.
    await world.call(INFER, infer("echo", idempotency_key=told[0]), "root")
    assert orchestrator.heads[-1].idempotency_key not in told


async def test_a_revoked_key_and_a_rotated_key(world: World) -> None:
    old = world.access.add("rotated", "infer:echo")
    world.access.add("revoked", "infer:echo")
    world.access.write()
    await until_known(world, "rotated")
    assert (await world.call(INFER, infer("echo"), "revoked"))[0] == "OK"
    new = new_key()
    entry = next(item for item in world.access.document["keys"] if item["name"] == "rotated")
    entry["hashes"].insert(0, key_hash(new))
    world.access.document["keys"] = [item for item in world.access.document["keys"] if item["name"] != "revoked"]
    world.access.write()
    await until_known(world, new)
    assert (await world.call(INFER, infer("echo"), old))[0] == (await world.call(INFER, infer("echo"), new))[0] == "OK"
    status, _, sentence = await world.call(INFER, infer("echo"), "revoked")
    assert status == "UNAUTHENTICATED"
    assert "revoked" in sentence
    entry["hashes"][1] = {"hash": entry["hashes"][1], "not_after": "2020-01-01T00:00:00Z"}
    world.access.write()
    while (await world.call(INFER, infer("echo"), old))[0] == "OK":
        await asyncio.sleep(0.01)
    assert "has expired" in (await world.call(INFER, infer("echo"), old))[2]


async def test_a_bad_access_file_changes_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    good = world.access.path.read_text()
    new = world.access.path.with_suffix(".new")
    new.write_text("keys: [{name: x, hashes: [twk_notahash]}]")
    new.replace(world.access.path)
    await world.mesh.until(lambda: "cannot be used" in caplog.text)
    assert "twk_notahash" not in caplog.text
    assert (await world.call(INFER, infer("echo"), "echo-user"))[0] == "OK"
    new.write_text(good)
    new.replace(world.access.path)
    world.access.add("later", "infer:echo")
    world.access.write()
    await until_known(world, "later")


async def test_kubernetes_exchanges_a_link(world: World) -> None:
    """A ConfigMap's file is a link through `..data`, a link to a directory that is exchanged as a whole."""
    folder = world.access.path.parent
    content = world.access.path.read_text()
    for version in ("..1", "..2"):
        (folder / version).mkdir()
    (folder / "..1" / "access.yaml").write_text(content)
    (folder / "..data").symlink_to("..1")
    world.access.path.unlink()
    world.access.path.symlink_to("..data/access.yaml")
    key = world.access.add("mounted", "infer:echo")
    (folder / "..2" / "access.yaml").write_text(yaml.safe_dump(world.access.document))
    (folder / "..data_tmp").symlink_to("..2")
    (folder / "..data_tmp").replace(folder / "..data")
    await until_known(world, key)
    (folder / "..1" / "access.yaml").unlink()
    world.access.path.unlink()
    world.access.write()


async def test_quotas_tell_the_true_wait(world: World) -> None:
    world.access.add("slow", "infer:echo", quota="slow")
    world.access.add("narrow", "infer:talker", quota="narrow")
    world.access.write(quotas={"slow": {"requests_per_s": 0.5, "burst": 2}, "narrow": {"max_in_flight": 1, "tokens_per_s": 1}})
    await until_known(world, "narrow")
    await until_known(world, "slow")
    while (await world.call(INFER, infer("echo"), "slow"))[0] == "OK":
        pass
    status, _, sentence = await world.call(INFER, infer("echo"), "slow")
    assert status == "RESOURCE_EXHAUSTED"
    assert "0.5 requests a second; come back in" in sentence
    wait_s = float(sentence.rpartition(" in ")[2].removesuffix(" s"))
    assert 0.5 < wait_s <= 2.0
    async with AsyncClient(world.mesh.endpoint, api_key=world.key("slow"), retries=0) as client:
        with pytest.raises(Overloaded) as raised:
            await client.model("echo")
        assert 0.4 < raised.value.retry_after_s <= 2.0, "RetryInfo"
    # Another caller is not concerned.
    assert (await world.call(INFER, infer("echo"), "echo-user"))[0] == "OK"
    # Three tokens at one a second, spent once they were generated.
    request = inference_pb2.GenerateRequest(model="talker", text="hello").SerializeToString()
    stream = world.channel.unary_stream(GENERATE)(request, metadata=(("x-api-key", world.key("narrow")),), timeout=20.0)
    assert len([message async for message in stream]) == 5
    status, _, sentence = await world.call(GENERATE, request, "narrow")
    assert (status, "tokens a second" in sentence) == ("RESOURCE_EXHAUSTED", True)
    counted = world.mesh.context.metrics
    assert counted.get_sample_value("tensorway_gateway_quota_refusals_total", {"limit": "tokens_per_s"}) == 1
    # The same of an answer in one piece, of as many tokens as its orchestrator says.
    whole = inference_pb2.InferRequest(model="talker")
    whole.inputs.add(name="text", dtype=DataType.BYTES, shape=[1], data=encode_bytes([b"hi"]))  # type: ignore[arg-type]
    whole.parameters["num_completion_tokens"].int64_value = 30  # the script says it back
    world.access.add("whole", "infer:talker", quota="narrow")
    world.access.write()
    await until_known(world, "whole")
    assert (await world.call(INFER, whole.SerializeToString(), "whole"))[0] == "OK"
    status, _, sentence = await world.call(INFER, whole.SerializeToString(), "whole")
    assert (status, "tokens a second; come back in 2" in sentence) == ("RESOURCE_EXHAUSTED", True), sentence
    assert counted.get_sample_value("tensorway_gateway_quota_refusals_total", {"limit": "requests_per_s"}) == 3


async def test_what_manages_and_what_was_refused_is_written_down(world: World) -> None:
    scale = model_pb2.ScaleModelRequest(model="echo", replicas=1).SerializeToString()
    metadata = (("x-request-id", "r-77"),)
    for who in ("operator", "echo-operator", "words-user", "twk_nonsense"):
        await world.call(f"{V1}ModelService/ScaleModel", scale, who, metadata=metadata)

    def entries() -> list[dict[str, str]]:
        found = [json.loads(line) for line in world.audit.read_text().splitlines()] if world.audit.exists() else []
        return [entry for entry in found if entry["request_id"] == "r-77" or entry["outcome"] == "malformed"]

    await world.mesh.until(lambda: len(entries()) >= 4)
    assert [(entry["principal"], entry["outcome"], entry["status"]) for entry in entries()[:3]] == [
        ("key:operator", "allowed", "OK"), ("key:echo-operator", "allowed", "OK"), ("key:words-user", "refused", "PERMISSION_DENIED"),
    ]
    assert entries()[0]["model"] == "echo"
    assert entries()[0]["method"].endswith("/ScaleModel")
    assert (entries()[3]["outcome"], entries()[3]["action"]) == ("malformed", "authenticate")
    assert world.audit.stat().st_mode & 0o777 == 0o600
    text = world.audit.read_text()
    assert not [name for name, key in world.access.keys.items() if key in text]

"""A whole mesh of real processes and real models, used as a client would."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import sysconfig
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from tensorway import AsyncClient, Client
from tensorway.errors import DeadlineExceeded, InvalidRequest, NotFound
from tensorway.registry.port import GATEWAY, GROUP, NODE, ORCHESTRATOR
from tests.integration.conftest import MODELS, ROOT, Mesh, running_mesh

pytestmark = [pytest.mark.models, pytest.mark.asyncio(loop_scope="module")]

ALL = ("minilm", "minilm-ids", "silero-vad", "efficientnet-lite0", "resnet50", "identity")
GRPCURL = Path(sysconfig.get_path("scripts")) / "grpcurl"
TRITON_PYTHON = ROOT / ".venv-triton" / "bin" / "python"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    async with running_mesh(tmp_path_factory.mktemp("mesh"), *ALL) as running:
        yield running


async def run(*command: object, status: int = 0) -> str:
    """Runs a command and returns what it printed."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env={**os.environ, "COLUMNS": "160"}
    )
    output = (await asyncio.wait_for(process.communicate(), 60))[0].decode()
    assert process.returncode == status, output
    return output


async def test_sentences_of_like_meaning_are_near(mesh: Mesh) -> None:
    async with AsyncClient(mesh.endpoint) as client:
        result = await client.infer("minilm", {"text": ["a man plays the guitar", "someone makes music", "shares fell on Tuesday"]})
        embedding = result["embedding"]
    assert embedding.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1.0, atol=1e-5)
    similarity = embedding @ embedding.T
    assert similarity[0, 1] > 0.4 > 0.2 > similarity[0, 2]


async def test_many_clients_at_once_get_their_own_answers(mesh: Mesh) -> None:
    """Batched with strangers of other lengths, every answer is the one it gets alone."""
    texts = [f"sentence number {number} " + "with some more words " * (number % 7) for number in range(40)]
    async with AsyncClient(mesh.endpoint) as client:
        alone = [(await client.infer("minilm", {"text": [text]}))["embedding"][0] for text in texts[:8]]
        together = await asyncio.gather(*(client.infer("minilm", {"text": [text]}) for text in texts))
    assert max(result.timing.batch_requests for result in together) > 1
    for one, result in zip(alone, together, strict=False):
        np.testing.assert_allclose(result["embedding"][0], one, atol=1e-5)


async def test_real_photographs_and_one_that_is_none(mesh: Mesh) -> None:
    samples = MODELS / "efficientnet-lite0" / "files" / "samples"
    good = asyncio.Semaphore(4)
    async with AsyncClient(mesh.endpoint) as client:
        async def classify(content: bytes) -> int:
            async with good:
                return int((await client.infer("efficientnet-lite0", {"image": [content]}))["class_id"][0])

        outcomes = await asyncio.gather(
            classify((samples / "china.jpg").read_bytes()),
            classify(b"this is no picture"),
            classify((samples / "flower.jpg").read_bytes()),
            return_exceptions=True,
        )
    assert (outcomes[0], outcomes[2]) == (698, 985)  # palace, daisy
    assert isinstance(outcomes[1], InvalidRequest)


async def test_speech_is_told_from_noise(mesh: Mesh) -> None:
    time_s = np.arange(512) / 16000
    silence = np.zeros((1, 512), np.float32)
    tone = (0.5 * np.sin(2 * np.pi * 440 * time_s)).astype(np.float32)[None]
    async with AsyncClient(mesh.endpoint) as client:
        result = await client.infer("silero-vad", {"audio": np.concatenate([silence, tone])})
    probability = result["speech_probability"]
    assert probability.shape == (2,)
    assert probability[0] < 0.2
    assert ((probability >= 0) & (probability <= 1)).all()


async def test_resnet_answers_with_its_declared_shape(mesh: Mesh) -> None:
    pixels = np.random.default_rng(0).standard_normal((2, 3, 224, 224), np.float32)
    async with AsyncClient(mesh.endpoint) as client:
        logits = (await client.infer("resnet50", {"pixel_values": pixels}))["logits"]
    assert logits.shape == (2, 1000)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("num_bytes", [4, 4096, 1 << 20, 40 << 20])
async def test_identity_returns_the_very_bytes(mesh: Mesh, num_bytes: int) -> None:
    sent = np.frombuffer(os.urandom(num_bytes), np.float32).reshape(1, -1)
    async with AsyncClient(mesh.endpoint) as client:
        output = (await client.infer("identity", {"input": sent}))["output"]
    assert output.tobytes() == sent.tobytes()


async def test_a_wrong_request_names_its_field(mesh: Mesh) -> None:
    async with AsyncClient(mesh.endpoint) as client:
        with pytest.raises(InvalidRequest) as wrong:
            await client.infer("minilm-ids", {"input_ids": np.ones((2, 5), np.int64), "attention_mask": np.ones((2, 4), np.int64)})
        assert "length" in str(wrong.value)
        with pytest.raises(NotFound, match="minilm-ids"):
            await client.infer("no-such-model", {"x": [1.0]})
        with pytest.raises(DeadlineExceeded):
            await client.infer("resnet50", {"pixel_values": np.zeros((16, 3, 224, 224), np.float32)}, timeout_s=0.05)


async def test_the_blocking_client(mesh: Mesh) -> None:
    def use() -> tuple[bool, int]:
        with Client(mesh.endpoint) as client:
            return client.is_ready(), len(client.models())

    assert await asyncio.to_thread(use) == (True, len(ALL))


@pytest.mark.parametrize("kind", [GATEWAY, ORCHESTRATOR, NODE, GROUP])
async def test_every_hop_answers_grpcurl(mesh: Mesh, kind: str) -> None:
    (member, *_) = await mesh.members(kind)
    listed = await run(GRPCURL, "-plaintext", member.endpoint, "list")
    assert "grpc.health.v1.Health" in listed
    assert json.loads(await run(GRPCURL, "-plaintext", member.endpoint, "grpc.health.v1.Health/Check"))["status"] == "SERVING"
    service = "tensorway.v1.NodeService" if kind == NODE else "tensorway.v1.InferenceService"
    assert service in listed
    assert "rpc" in await run(GRPCURL, "-plaintext", member.endpoint, "describe", service)


@pytest.mark.parametrize("kind", [GATEWAY, ORCHESTRATOR, GROUP])
async def test_each_hop_can_be_called_alone(mesh: Mesh, kind: str) -> None:
    members = [member for member in await mesh.members(kind) if member.metadata.get("model", "identity") == "identity"]
    tensor = {"name": "input", "dtype": "DATA_TYPE_FP32", "shape": [1, 2], "data": "AACAPwAAAEA="}
    call = json.dumps({"model": "identity", "inputs": [tensor]})
    output = await run(
        GRPCURL, "-plaintext", "-v", "-d", call, members[0].endpoint, "tensorway.v1.InferenceService/Infer"
    )
    assert '"data": "AACAPwAAAEA="' in output
    if kind == GATEWAY:
        assert "tensorway-timing: queue=" in output


async def test_grpcurl_sees_rich_errors_and_oip(mesh: Mesh) -> None:
    wrong = await run(
        GRPCURL, "-plaintext", "-d", '{"model":"identity","inputs":[{"name":"inputt"}]}', mesh.endpoint,
        "tensorway.v1.InferenceService/Infer", status=64 + 3,
    )
    assert "google.rpc.BadRequest" in wrong
    ready = await run(GRPCURL, "-plaintext", mesh.endpoint, "inference.GRPCInferenceService/ServerReady")
    assert json.loads(ready) == {"ready": True}


async def test_groups_and_their_processes_are_told_by_the_node(mesh: Mesh) -> None:
    (node,) = await mesh.members(NODE)
    groups = json.loads(await run(GRPCURL, "-plaintext", node.endpoint, "tensorway.v1.NodeService/ListGroups"))["groups"]
    assert {group["model"] for group in groups} == set(ALL)
    assert all(group["state"] == "GROUP_STATE_READY" and int(group["memory_bytes"]) > 10**7 for group in groups)


async def test_tritonclient_in_its_own_process(mesh: Mesh) -> None:
    output = await run(TRITON_PYTHON, ROOT / "tests" / "integration" / "triton_script.py", mesh.endpoint)
    assert output.strip().splitlines()[-1] == "all good", output


async def test_ops_ports(mesh: Mesh) -> None:
    def read(url: str) -> str:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())

    for kind in (GATEWAY, ORCHESTRATOR, NODE):
        (member,) = await mesh.members(kind)
        base = f"http://{member.metadata['ops']}"
        assert (await asyncio.to_thread(read, f"{base}/healthz")).strip() == "ok"
        assert (await asyncio.to_thread(read, f"{base}/readyz")).strip() == "ready"
        assert "process_cpu_seconds_total" in await asyncio.to_thread(read, f"{base}/metrics")
    (orchestrator,) = await mesh.members(ORCHESTRATOR)
    assert "tensorway_orchestrator_batch_rows" in await asyncio.to_thread(read, f"http://{orchestrator.metadata['ops']}/metrics")


async def test_the_command_line(mesh: Mesh) -> None:
    tensorway = Path(sysconfig.get_path("scripts")) / "tensorway"
    inferred = await run(tensorway, "infer", "minilm", "--text", "hello", "--endpoint", mesh.endpoint)
    assert "embedding" in inferred
    listed = await run(tensorway, "models", "list", "--endpoint", mesh.endpoint)
    assert all(name in listed for name in ALL)
    checked = await run(tensorway, "doctor", "--endpoint", mesh.endpoint, "--registry", mesh.registry_url)
    assert "gateway" in checked
    assert sys.version.split()[0] in checked

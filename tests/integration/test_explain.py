"""Explain through a whole mesh: every hop, the client, the command line, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from tensorway import AsyncClient, Explain
from tensorway.errors import InvalidRequest, TensorwayError
from tensorway.model_directory import load_directory
from tensorway.registry.port import GROUP, ORCHESTRATOR
from tensorway.results import read_result
from tensorway.transport import AsyncChannel
from tensorway.v1 import inference_pb2, tensor_pb2
from tensorway_worker.engines import open_engine

from .conftest import MODELS, Mesh, running_mesh

EXPLAIN = "/tensorway.v1.InferenceService/Explain"
SENTENCES = ["a cat sat on the mat", "stock markets fell"]

pytestmark = pytest.mark.models


def local_saliency(element: int) -> list[numpy.ndarray]:
    """|d embedding[element] / d token embedding| of each sentence, by plain torch on the uncut model."""
    engine = open_engine(load_directory(MODELS / "minilm"), "cpu")
    engine.load()
    found: list[numpy.ndarray] = []
    for sentence in SENTENCES:
        text = numpy.array([sentence.encode()], dtype=object)
        inputs = engine.preprocess({"text": text}, {})
        leaves: list[torch.Tensor] = []
        module = engine.embedding("input_ids")
        assert module is not None
        hook = module.register_forward_hook(lambda _, __, out, leaves=leaves: leaves.append(out.detach().requires_grad_()) or leaves[-1])
        score = engine.run(inputs)["embedding"][0, element]
        hook.remove()
        (gradient,) = torch.autograd.grad(score, leaves)
        found.append(gradient[0].norm(dim=-1).numpy())
    return found


def request(sentence: str, element: int) -> bytes:
    data = len(sentence).to_bytes(4, "little") + sentence.encode()
    return inference_pb2.ExplainRequest(
        model="minilm", inputs=[tensor_pb2.Tensor(name="text", dtype=tensor_pb2.DATA_TYPE_BYTES, shape=[1], data=data)],
        options=inference_pb2.ExplainOptions(
            method=inference_pb2.EXPLAIN_METHOD_SALIENCY, target=inference_pb2.ExplainTarget(output="embedding", index=[element])
        ),
    ).SerializeToString()


def command(mesh: Mesh, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from tensorway.cli.app import main; main()", "explain", *words, "--endpoint", mesh.endpoint],
        capture_output=True, text=True, timeout=60, check=False,
    )


async def test_explain_at_every_hop(mesh_dir: Path) -> None:
    wanted = local_saliency(7)
    async with running_mesh(mesh_dir, "minilm", "identity") as mesh, AsyncClient(mesh.endpoint) as client:
        (orchestrator,), groups = await mesh.members(ORCHESTRATOR), await mesh.members(GROUP)
        (group,) = (one for one in groups if one.metadata["model"] == "minilm")
        for endpoint in (mesh.endpoint, orchestrator.endpoint, group.endpoint):
            channel = AsyncChannel(endpoint)
            for sentence, saliency in zip(SENTENCES, wanted, strict=True):
                result = read_result((await channel.unary(EXPLAIN, request(sentence, 7), 20.0)).response, {}, as_torch=False)
                numpy.testing.assert_allclose(result["attribution"][0], saliency, rtol=1e-4, atol=1e-7)
                assert result["tokens"].shape == result["attribution"].shape
            await channel.close()
        await integrated(client)
        await refused(client)
        shown(mesh)


async def integrated(client: AsyncClient) -> None:
    """Two sentences at once, toward a third: attributions add up to what the score gains over an empty input."""
    direction = (await client.infer("minilm", {"text": ["a kitten"]}))["embedding"][0]
    result = await client.explain("minilm", {"text": SENTENCES}, Explain(weights=direction, num_points=40))
    scores = (await client.infer("minilm", {"text": SENTENCES}))["embedding"] @ direction
    numpy.testing.assert_allclose(result["score"], scores, atol=1e-5)
    assert abs(result["gap"]).max() < 1e-3
    assert result["attribution"].shape == result["tokens"].shape
    assert [bytes(token).strip() for token in result["tokens"][0]][:3] == [b"[CLS]", b"a", b"cat"]
    both = await client.explain("identity", {"input": numpy.array([[1.0, 5.0, 2.0]], numpy.float32)}, Explain("input_x_gradient"))
    assert both["attribution"].tolist() == [[0.0, 5.0, 0.0]]
    assert both["chosen"].tolist() == [1]


async def refused(client: AsyncClient) -> None:
    x = {"input": numpy.ones((1, 2), numpy.float32)}
    for wish, said in (
        (Explain(output="z"), "no output 'z', only output"),
        (Explain(input="z"), "no input 'z'"),
        (Explain(index=(9,)), r"\[9\] is no element of a row of output"),
        (Explain(index=(0,), weights=numpy.ones(2, numpy.float32)), "give an index or weights, not both"),
        (Explain(num_points=4000), "num_points"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            await client.explain("identity", x, wish)
    with pytest.raises(InvalidRequest, match="method: must be one of"):
        await client.explain("identity", x, Explain(method="guess"))
    with pytest.raises(TensorwayError, match="nobody"):
        await client.explain("nobody", x)


def shown(mesh: Mesh) -> None:
    done = command(mesh, "minilm", "--text", SENTENCES[0], "--toward", "a kitten", "--points", "20")
    assert done.returncode == 0, done.stderr
    assert "[CLS] a cat sat on the mat [SEP]" in done.stdout
    assert "gap" in done.stdout
    done = command(mesh, "identity", "--input", "input=[[1, 5, 2]]", "--method", "saliency", "--index", "2", "--json")
    assert json.loads(done.stdout)["attribution"] == [[0.0, 0.0, 1.0]]
    done = command(mesh, "identity", "--input", "input=[[1, 5]]", "--index", "first")
    assert done.returncode == 1
    assert done.stderr.startswith("tensorway: --index 'first': write whole numbers")

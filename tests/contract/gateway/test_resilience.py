"""Idempotency keys and fallbacks as the gateway carries them, in both dialects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tensorway.client import AsyncClient
from tensorway.compat import grpc_service_pb2
from tensorway.errors import InvalidRequest
from tensorway.transport import AsyncChannel
from tensorway.transport.port import Exchange
from tensorway.v1 import inference_pb2, link_pb2, tensor_pb2
from tests.contract.gateway.scripted import WORDS, answer, echo_reply, running_mesh, spec

X = np.ones((1, 4), np.float32)
#: Answers for `words`.
SPARE = spec("spare", WORDS.signature.inputs, WORDS.signature.outputs, version="7")
_OipTensor = grpc_service_pb2.ModelInferRequest.InferInputTensor
OIP_INFER = "/inference.GRPCInferenceService/ModelInfer"
INFER = "/tensorway.v1.InferenceService/Infer"


async def test_a_key_goes_with_the_request_and_always_to_the_same_orchestrator(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, scripts=(answer, answer)) as mesh, AsyncClient(mesh.endpoint) as client:
        for _ in range(3):
            await client.infer("echo", {"x": X}, idempotency_key="order-17")
        asked = [orchestrator for orchestrator in mesh.orchestrators if orchestrator.heads]
        assert len(asked) == 1
        assert [head.idempotency_key for head in asked[0].heads] == ["order-17"] * 3
        with pytest.raises(InvalidRequest, match="at most 256 characters"):
            await client.infer("echo", {"x": X}, idempotency_key="x" * 257)


async def test_the_key_may_come_as_metadata_in_every_dialect(tmp_path: Path) -> None:
    oip = grpc_service_pb2.ModelInferRequest(
        model_name="echo", inputs=[_OipTensor(name="x", datatype="FP32", shape=[1, 4])], raw_input_contents=[X.tobytes()]
    )
    native = inference_pb2.InferRequest(model="echo", inputs=[tensor_pb2.Tensor(name="x", dtype=12, shape=[1, 4], data=X.tobytes())])
    async with running_mesh(tmp_path) as mesh:
        channel = AsyncChannel(mesh.endpoint)
        try:
            for method, message in ((OIP_INFER, oip), (INFER, native)):
                await channel.unary(method, message.SerializeToString(), 5.0, (("idempotency-key", "k-1"),))
        finally:
            await channel.close()
        assert [head.idempotency_key for head in mesh.orchestrators[0].heads] == ["k-1", "k-1"]


async def test_a_fallbacks_answer_names_who_answered(tmp_path: Path) -> None:
    def fall_back(exchange: Exchange, head: link_pb2.RequestHead) -> None:
        reply, payload = echo_reply(head, exchange.payload)
        named = link_pb2.ReplyHead.FromString(reply)
        named.model, named.revision = "spare", SPARE.revision
        exchange.reply(named.SerializeToString(), payload)

    oip = grpc_service_pb2.ModelInferRequest(
        model_name="words", inputs=[_OipTensor(name="text", datatype="BYTES", shape=[1])], raw_input_contents=[b"\x02\0\0\0hi"]
    )
    async with running_mesh(tmp_path, scripts=(fall_back,), specs=(WORDS, SPARE)) as mesh:
        async with AsyncClient(mesh.endpoint) as client:
            result = await client.infer("words", {"text": ["hi"]})
            assert (result.model, result.revision) == ("spare", SPARE.revision)
        channel = AsyncChannel(mesh.endpoint)
        try:
            reply = await channel.unary(OIP_INFER, oip.SerializeToString(), 5.0)
        finally:
            await channel.close()
        answered = grpc_service_pb2.ModelInferResponse.FromString(reply.response)
        assert (answered.model_name, answered.model_version) == ("spare", "7")
        assert str(reply.trailers["tensorway-timing"]).endswith(";fallback=spare")

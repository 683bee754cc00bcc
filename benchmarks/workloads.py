"""The requests that are measured, as serialised InferRequests."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

from tensorway.v1 import inference_pb2, tensor_pb2


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of request."""

    name: str
    model: str
    message: bytes
    #: Tensor bytes each way, for GB/s.
    payload_bytes: int


def identity(name: str, num_bytes: int) -> Workload:
    content = random.Random(0).randbytes(num_bytes)
    tensor = tensor_pb2.Tensor(name="input", dtype=tensor_pb2.DATA_TYPE_FP32, shape=[1, num_bytes // 4], data=content)
    return Workload(name, "identity", _request("identity", tensor), num_bytes)


def minilm_32_tokens() -> Workload:
    generator = random.Random(1)
    ids = struct.pack("<32q", 101, *(generator.randrange(1000, 28000) for _ in range(30)), 102)
    mask = struct.pack("<32q", *([1] * 32))
    tensors = [
        tensor_pb2.Tensor(name="input_ids", dtype=tensor_pb2.DATA_TYPE_INT64, shape=[1, 32], data=ids),
        tensor_pb2.Tensor(name="attention_mask", dtype=tensor_pb2.DATA_TYPE_INT64, shape=[1, 32], data=mask),
    ]
    return Workload("MiniLM, 32 tokens", "minilm-ids", _request("minilm-ids", *tensors), 512)


def resnet50() -> Workload:
    generator = random.Random(2)
    content = struct.pack("<150528f", *(generator.gauss(0.0, 1.0) for _ in range(150528)))
    tensor = tensor_pb2.Tensor(name="pixel_values", dtype=tensor_pb2.DATA_TYPE_FP32, shape=[1, 3, 224, 224], data=content)
    return Workload("ResNet-50", "resnet50", _request("resnet50", tensor), len(content))


def _request(model: str, *tensors: tensor_pb2.Tensor) -> bytes:
    # A fixed id, so that every answer has the same length and can be checked by it.
    return inference_pb2.InferRequest(model=model, request_id="bench", inputs=tensors).SerializeToString()

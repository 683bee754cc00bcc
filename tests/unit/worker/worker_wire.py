"""What an orchestrator would write to a leader and read from it, and the same path inside this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tensorway.errors import TensorwayError, error_from
from tensorway.model_directory import load_directory
from tensorway.tensors import DataType, Tensor
from tensorway.transport.port import Payload
from tensorway.v1 import link_pb2, tensor_pb2
from tensorway_worker.engines import open_engine
from tensorway_worker.rank.codec import Codec, Times
from tensorway_worker.rank.explain import Explainer
from tensorway_worker.rank.layout import Layouts
from tensorway_worker.rank.solo import SoloGroup
from tensorway_worker.rank.step import BatchRunner

REPOSITORY = Path(__file__).parents[3]
TEST_MODELS = REPOSITORY / "tests" / "models"
MODELS = REPOSITORY / "models"


@dataclass
class Sent:
    """One request of a batch."""

    inputs: Sequence[Tensor]
    output_names: Sequence[str] = ()
    parameters: dict[str, int] = field(default_factory=dict)
    remaining_us: int = 60_000_000
    request_id: str = "request"


Outcome = dict[str, Tensor] | TensorwayError


def tensor(name: str, value: torch.Tensor, dtype: DataType) -> Tensor:
    """A torch tensor as the wire has it."""
    flat = value.contiguous().reshape(-1)
    data = bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""
    return Tensor(name, dtype, tuple(value.shape), data)


def write_batch(requests: Sequence[Sent], epoch: int = 1, segment_bytes: int = 0) -> tuple[bytes, Payload]:
    """A BatchHead and its body; `segment_bytes` cuts the body into pieces of that size, as chunks of a link arrive."""
    heads = [
        link_pb2.RequestHead(
            request_id=one.request_id,
            inputs=[
                link_pb2.TensorHead(name=item.name, dtype=int(item.dtype), shape=item.shape, num_bytes=len(item.data))  # type: ignore[arg-type]
                for item in one.inputs
            ],
            output_names=one.output_names,
            parameters={name: tensor_pb2.Parameter(int64_value=value) for name, value in one.parameters.items()},
        ).SerializeToString()
        for one in requests
    ]
    head = link_pb2.BatchHead(
        batch_id=1, epoch=epoch, requests=heads, remaining_us=[one.remaining_us for one in requests]
    ).SerializeToString()
    segments: list[bytes] = [bytes(item.data) for one in requests for item in one.inputs]
    if segment_bytes:
        body = b"".join(segments)
        segments = [body[start : start + segment_bytes] for start in range(0, len(body), segment_bytes)]
    return head, tuple(segments)


def read_reply(head: bytes, payload: Payload) -> tuple[list[Outcome], link_pb2.BatchReplyHead]:
    """Each request's outputs or error, and the whole head."""
    message = link_pb2.BatchReplyHead.FromString(head)
    body, offset = b"".join(payload), 0
    outcomes: list[Outcome] = []
    for result in message.results:
        if result.HasField("error"):
            error = result.error
            outcomes.append(error_from(error.reason, error.status, error.message, field=error.field, hop=error.hop))
            continue
        outputs: dict[str, Tensor] = {}
        end = offset + result.body_bytes
        for item in link_pb2.ResponseHead.FromString(result.response).outputs:
            data = body[offset : offset + item.num_bytes]
            outputs[item.name] = Tensor(item.name, DataType(item.dtype), tuple(item.shape), data)
            offset += item.num_bytes
        assert offset == end
        outcomes.append(outputs)
    assert offset == len(body)
    return outcomes, message


class InProcess:
    """A revision loaded in this process; batches take the rank's own way through codec and runner."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.directory = load_directory(path)
        self.engine = open_engine(self.directory, device)
        with torch.inference_mode(False), torch.no_grad():
            self.engine.load()
        spec = self.directory.spec
        group = SoloGroup(self.engine)
        self.runner = BatchRunner(self.engine, spec, path, group.run, Explainer(group, self.engine, spec))
        self.codec = Codec(spec.model, spec.revision, Layouts(spec.signature, self.runner.padding), self.runner.rules.check_names)

    def batch(self, requests: Sequence[Sent], segment_bytes: int = 0) -> list[Outcome]:
        batch = self.codec.read_batch(*write_batch(requests, segment_bytes=segment_bytes))
        with torch.inference_mode():
            staged = self.runner.stage(batch.requests)
            self.runner.run(staged)
            results = self.runner.finish(staged)
        return read_reply(*self.codec.write_reply(results, Times(1, 2, 3)))[0]

    def alone(self, requests: Sequence[Sent]) -> list[Outcome]:
        """Each request in a batch of its own."""
        return [self.batch([one])[0] for one in requests]


def answered(outcome: Outcome) -> dict[str, Tensor]:
    """The outputs of a request that must not have failed."""
    assert isinstance(outcome, dict), outcome
    return outcome


def as_torch(value: Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An output's content."""
    if not value.data:
        return torch.empty(value.shape, dtype=dtype)
    return torch.frombuffer(bytearray(value.data), dtype=dtype).reshape(value.shape)

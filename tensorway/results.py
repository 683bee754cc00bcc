"""What the Python client gives back: results, timings, streams and descriptions, read from the wire."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tensorway.arrays import to_numpy, to_torch
from tensorway.parameter_message import read_parameters
from tensorway.signature import Dimension, TensorSpec
from tensorway.tensors import DataType, Tensor
from tensorway.v1 import inference_pb2, model_pb2

TIMING_TRAILER: Final = "tensorway-timing"
_STATE_PREFIX: Final = "MODEL_STATE_"


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a request's time went, as the `tensorway-timing` trailer tells. Durations in microseconds."""

    queue_us: int = 0
    #: Waiting at the group's leader for the step before.
    wait_us: int = 0
    #: The forward pass.
    step_us: int = 0
    #: Spent in the gateway itself.
    gateway_us: int = 0
    #: Spent in the orchestrator and on the links, beyond the queue and the group.
    orchestrator_us: int = 0
    batch_rows: int = 0
    batch_requests: int = 0
    num_attempts: int = 0
    #: Id of the group that answered.
    group: str = ""

    def __str__(self) -> str:
        """One line for a person, milliseconds."""
        rows = f"{self.batch_rows} row{'' if self.batch_rows == 1 else 's'}"
        requests = f"{self.batch_requests} request{'' if self.batch_requests == 1 else 's'}"
        times = " · ".join(
            f"{name} {us / 1000:.2f} ms"
            for name, us in (
                ("step", self.step_us), ("waiting at the group", self.wait_us), ("queue", self.queue_us),
                ("orchestrator and links", self.orchestrator_us), ("gateway", self.gateway_us),
            )
        )
        attempts = f" · {self.num_attempts} attempts" if self.num_attempts > 1 else ""
        return f"{times} · batch of {rows} from {requests} in {self.group}{attempts}"

    @classmethod
    def parse(cls, line: str) -> Timing:
        """Reads the trailer; what is absent or unreadable stays 0, because timing must never fail an answered request."""
        found = {name: value for name, _, value in (part.partition("=") for part in line.split(";"))}
        rows, _, requests = found.get("batch", "").partition("/")
        return cls(
            **{f"{name}_us": _whole(found.get(name, "")) for name in ("queue", "wait", "step", "gateway", "orchestrator")},
            batch_rows=_whole(rows), batch_requests=_whole(requests), num_attempts=_whole(found.get("attempts", "")),
            group=found.get("group", ""),
        )


@dataclass(frozen=True, slots=True)
class InferResult(Mapping[str, Any]):
    """The outputs by name. `result["embedding"]` is a numpy array (a torch tensor where the client was asked for that)."""

    model: str
    #: Full revision that answered.
    revision: str
    request_id: str
    #: The outputs as they came, in order.
    tensors: tuple[Tensor, ...]
    #: Values set by the model's own postprocess.
    parameters: Mapping[str, bool | int | float | str]
    timing: Timing
    as_torch: bool = False
    _arrays: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __getitem__(self, name: str) -> Any:
        array = self._arrays.get(name)
        if array is None:
            tensor = self._tensor(name)
            array = self._arrays[name] = to_torch(tensor) if self.as_torch and tensor.dtype is not DataType.BYTES else to_numpy(tensor)
        return array

    def __iter__(self) -> Iterator[str]:
        return (tensor.name for tensor in self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def torch(self, name: str) -> Any:
        """One output as a `torch.Tensor` of its own memory."""
        return to_torch(self._tensor(name))

    def _tensor(self, name: str) -> Tensor:
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(f"no output {name!r}, only {', '.join(self)}")


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """One model as the mesh describes it."""

    name: str
    revision: str
    version: str
    engine: str
    #: `loading`, `ready` or `unavailable`.
    state: str
    #: Why it is not ready; empty where it is.
    reason: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    #: Most rows in one batch; 0 where requests are never joined.
    max_rows: int
    num_replicas: int
    num_ready_replicas: int
    description: str
    #: True: no group is wanted until a request comes, which then waits for one.
    is_dormant: bool = False

    @property
    def is_ready(self) -> bool:
        return self.state == "ready"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation."""

    #: `system`, `user`, `assistant`, or what else the model's template knows.
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Started:
    """The first event of a generation."""

    stream_id: str
    request_id: str
    model: str
    #: Full revision that answers.
    revision: str
    #: Given back as the option `seed`, it repeats the answer.
    seed: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of a drawn token's probability, and (token id, logarithm) of the most likely ones, most likely first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What was added to a choice. Texts joined over all deltas of a choice are its answer."""

    choice: int
    #: Tokens of the choice before this delta.
    offset: int
    token_ids: tuple[int, ...]
    text: str
    #: One for each token, where asked for.
    logprobs: tuple[TokenLogprob, ...] = ()
    #: True: this is the prompt itself, which was asked for with `echo`.
    is_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a choice."""

    choice: int
    #: `eos`, `stop_string`, `stop_token` or `length`.
    reason: str
    #: The stop string that ended the answer.
    stop_match: str
    num_prompt_tokens: int
    num_completion_tokens: int
    #: Tokens of the prompt that were known from another request.
    num_cached_tokens: int
    #: Times that the choice was begun or continued on a group; 1: nothing went wrong.
    num_attempts: int
    group: str


#: What a generation yields.
GenerationEvent = Started | Delta | Finished


def read_event(message: bytes) -> tuple[int, GenerationEvent | None]:
    """Number and content of a serialised GenerateResponse; None for an event that this client does not know."""
    response = inference_pb2.GenerateResponse.FromString(message)
    event: GenerationEvent | None = None
    kind = response.WhichOneof("event")
    if kind == "started":
        started = response.started
        event = Started(started.stream_id, started.request_id, started.model, started.revision, started.seed)
    elif kind == "delta":
        delta = response.delta
        logprobs = tuple([TokenLogprob(item.logprob, tuple([(top.token_id, top.logprob) for top in item.top])) for item in delta.logprobs])
        event = Delta(delta.choice, delta.offset, tuple(delta.token_ids), delta.text, logprobs, delta.is_prompt)
    elif kind == "finished":
        finished, usage = response.finished, response.finished.usage
        reason = inference_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower()
        event = Finished(
            finished.choice, reason, finished.stop_match, usage.num_prompt_tokens, usage.num_completion_tokens, usage.num_cached_tokens,
            finished.num_attempts, finished.group,
        )
    return response.sequence, event


def read_result(message: bytes, trailers: Mapping[str, str | bytes], *, as_torch: bool) -> InferResult:
    """The result in a serialised InferResponse."""
    response = inference_pb2.InferResponse.FromString(message)
    tensors = tuple([Tensor(item.name, DataType(item.dtype), tuple(item.shape), item.data) for item in response.outputs])
    parameters = read_parameters(response.parameters)
    return InferResult(
        response.model, response.revision, response.request_id, tensors, parameters, Timing.parse(str(trailers.get(TIMING_TRAILER, ""))),
        as_torch,
    )


def read_model(message: model_pb2.Model) -> ModelDescription:
    """The description in a `tensorway.v1.Model`."""
    return ModelDescription(
        name=message.name, revision=message.revision, version=message.version, engine=message.engine,
        state=model_pb2.ModelState.Name(message.state).removeprefix(_STATE_PREFIX).lower(), reason=message.reason,
        inputs=tuple(map(_spec, message.inputs)), outputs=tuple(map(_spec, message.outputs)), max_rows=message.max_rows,
        num_replicas=message.num_replicas, num_ready_replicas=message.num_ready_replicas, description=message.description,
        is_dormant=message.is_dormant,
    )


def _spec(message: model_pb2.TensorSpec) -> TensorSpec:
    shape: tuple[Dimension, ...] = tuple(item.name if item.extent < 0 else item.extent for item in message.shape)
    return TensorSpec(message.name, DataType(message.dtype), shape)


def _whole(text: str) -> int:
    digits = text.removesuffix("us")
    return int(digits) if digits.isdecimal() else 0

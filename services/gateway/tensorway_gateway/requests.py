"""A request on its way through the gateway, and its answer. No dialect and no protobuf is seen from here on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from tensorway.tensors import Tensor, TensorHead
from tensorway.transport.port import Payload

#: A free-form value that travels beside the tensors.
Value = bool | int | float | str

#: Bounds of `priority`; higher goes first.
MIN_PRIORITY: Final = -100
MAX_PRIORITY: Final = 100

#: More inputs, outputs, parameters or dimensions than any model has: refused before anything walks through them.
MAX_NUM_ITEMS: Final = 1024
MAX_NUM_DIMENSIONS: Final = 64
MAX_REQUEST_ID_CHARS: Final = 512

#: How a dialect names an input, or a part of it, in an error: (index, name, part) -> path.
FieldPath = Callable[[int, str, str], str]


def native_field(index: int, name: str, part: str) -> str:
    """`inputs[1].shape`, as the fields of `tensorway.v1.InferRequest` are called."""
    return f"inputs[{index}].{part}"


@dataclass(frozen=True, slots=True)
class Arrival:
    """One inference request as parsed, not yet checked against any signature."""

    model: str
    #: Empty for what serves now; a revision or prefix of one; with `is_version` also the author's version label.
    revision: str
    is_version: bool
    request_id: str
    inputs: tuple[Tensor, ...]
    output_names: tuple[str, ...]
    parameters: Mapping[str, Value]
    priority: int
    #: The dialect's own limit beside the call's deadline; None where it set none.
    timeout_s: float | None
    #: Tensor bytes of all inputs.
    num_bytes: int
    #: When its bytes reached the servicer, seconds on `time.monotonic()`.
    arrived_s: float
    field_path: FieldPath = native_field
    #: Serialised ExplainOptions; empty for a request that is not to be explained.
    explain: bytes = b""
    #: The field of the native dialect; see `idempotency_key`.
    idempotency_key: str = ""


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """Where a client goes on with a stream whose connection it lost."""

    stream_id: str
    #: Number of the first message that it wants.
    next_sequence: int


@dataclass(frozen=True, slots=True)
class GenerationArrival:
    """One generation as parsed and checked, but for its model."""

    #: Empty where `resume` says which stream is meant.
    model: str
    #: As in `Arrival`.
    revision: str
    is_version: bool
    request_id: str
    #: The serialised GenerateRequest.
    message: bytes
    num_choices: int
    priority: int
    #: As in `Arrival`.
    timeout_s: float | None
    #: When its bytes reached the servicer, seconds on `time.monotonic()`.
    arrived_s: float
    #: None: a new stream.
    resume: StreamPosition | None = None

    @property
    def num_bytes(self) -> int:
        return len(self.message)


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a request's time went beyond the gateway; see `tensorway.v1.Timing`. Durations in microseconds."""

    queue_us: int
    group_us: int
    wait_us: int
    step_us: int
    prepare_us: int
    batch_rows: int
    batch_requests: int
    is_first_in_batch: bool
    num_attempts: int
    group: str
    num_hedges: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `contents[i]` are the segments of `outputs[i]`, as they arrived."""

    outputs: tuple[TensorHead, ...]
    contents: tuple[Payload, ...]
    revision: str
    timing: Timing
    parameters: Mapping[str, Value] = field(default_factory=dict)
    #: Set where another model answered: the fallback of the one asked for.
    model: str = ""


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer with what the dialects echo of the request."""

    answer: Answer
    request_id: str
    #: Name of the model that answered.
    model: str
    #: The author's label of the revision that answered.
    version: str

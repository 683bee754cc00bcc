"""The signature of a model: the names, dtypes and shapes it takes and returns.

A dimension is a fixed extent or a name. Equal names mean equal extents within one request; the name `rows` is the batch dimension, along
which requests are joined. A model whose inputs and outputs all start with `rows` may be batched; any other runs one request a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tensorway.generation import GenerationLimits
from tensorway.resilience import Fallback, Hedging, Scaling
from tensorway.tensors import DataType

#: Name of the batch dimension.
ROWS: Final = "rows"

#: A fixed extent, or the name of one that varies.
Dimension = int | str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output."""

    name: str
    dtype: DataType
    shape: tuple[Dimension, ...]

    @property
    def has_rows(self) -> bool:
        return bool(self.shape) and self.shape[0] == ROWS

    @property
    def extents(self) -> tuple[int, ...]:
        """The shape with -1 for every dimension that varies, as OIP metadata writes it."""
        return tuple(extent if isinstance(extent, int) else -1 for extent in self.shape)


@dataclass(frozen=True, slots=True)
class Padding:
    """How one input of variable length is made equal to its neighbours in a batch."""

    input: str
    #: Value of the added elements.
    value: float


@dataclass(frozen=True, slots=True)
class Batching:
    """How requests of one revision are joined."""

    #: Most rows in one step.
    max_rows: int = 32
    #: The author's wish to wait for company, milliseconds; 0 sends what is there as soon as a group can take it.
    max_delay_ms: float = 0.0
    #: Most rows waiting in one orchestrator's queue before RESOURCE_EXHAUSTED.
    max_queue_rows: int = 4096
    #: A request of more than `max_rows` rows: `refuse` it with INVALID_ARGUMENT, or run it `alone` in a step of its own.
    oversize: str = "refuse"
    #: Inputs that may be padded; an input of variable length without a rule only meets requests of its own lengths.
    padding: tuple[Padding, ...] = ()


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs in the author's order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def is_batchable(self) -> bool:
        """True where every input and output starts with `rows`."""
        return all(spec.has_rows for spec in (*self.inputs, *self.outputs))


@dataclass(frozen=True, slots=True)
class RevisionSpec:
    """All that the mesh needs to know of one revision without its files. Published in the registry as JSON."""

    model: str
    revision: str
    version: str
    description: str
    engine: str
    signature: Signature
    batching: Batching
    num_replicas: int
    #: Requests without a deadline get this one, seconds.
    default_timeout_s: float
    #: None: the model does not generate tokens.
    generation: GenerationLimits | None = None
    #: None: late requests are not hedged.
    hedging: Hedging | None = None
    #: None: nobody answers for this model.
    fallback: Fallback | None = None
    #: None: only people choose the number of replicas.
    scaling: Scaling | None = None

"""The engines' port: one loaded model as a rank sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tensorway.errors import InvalidRequest, ModelFailed, OutOfMemory, TensorwayError
from tensorway.model import Inputs, InvalidInput, Outputs, Parameters, Value
from tensorway_worker.topology import Place

if TYPE_CHECKING:
    import torch

#: `agree(key, decide)`: rank 0 calls `decide` and every rank of the group gets its text; so that all cut a model alike.
Agree = Callable[[str, Callable[[], str]], str]


class Collective(Protocol):
    """Sums and joins over the shards of one stage. Every shard makes the same calls in the same order, in its torch thread.

    Plain data movement without autograd; `engines/cut/shards.py` gives it derivatives.
    """

    shard: int
    num_shards: int

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all shards, in place; `tensor` is contiguous."""

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The shards' tensors (equal shapes) joined along `dim`, in shard order."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What an engine is told when it is to hold only a part of the model."""

    place: Place
    collective: Collective
    agree: Agree


class Engine(Protocol):
    """A model that can be loaded and run. `load`, `run` and `memory_bytes` are called in the rank's torch thread only."""

    #: Where `run` wants its tensors: `cpu` or `cuda:N`.
    device: str
    #: Whether requests pass through `preprocess` / `postprocess`; where False the method is not called.
    has_preprocess: bool
    has_postprocess: bool
    #: Threads that may run `preprocess` at once.
    preprocess_threads: int
    #: Input name -> value of the elements that padding adds.
    padding: Mapping[str, float]

    def load(self) -> None:
        """Reads weights. Raises FailedPrecondition, or whatever the model raises; the rank ends with that message."""

    def run(self, inputs: Inputs) -> Outputs:
        """One step on joined inputs (dimension 0 = rows) that lie on `device`; the outputs by name, still on `device`.

        Of a cut engine, this rank's part of the step: the first stage takes the inputs, any other what the stage before returned; the
        last returns the outputs, any other what the next stage needs, tensors by name (dimension 0 = rows). With gradients enabled,
        what it returns is differentiable with respect to what it was given.
        """

    def embedding(self, name: str) -> torch.nn.Module | None:
        """The module whose output stands for the integer input `name` where derivatives are asked for (first stage only); None where
        there is none and the input itself must be a floating-point tensor."""

    def preprocess(self, inputs: Inputs, parameters: Parameters) -> Inputs:
        """One request, in a staging thread."""

    def postprocess(self, outputs: Outputs, parameters: Parameters) -> Outputs:
        """One request's slice of the outputs, on the CPU, in a staging thread."""

    def example(self, rows: int) -> Inputs | None:
        """Inputs of `run` for warming up, on the CPU; None to have them made from the signature."""

    def tokens(self, name: str, value: Value) -> Value | None:
        """The text of each element of the integer input `name`, same shape, as `bytes` objects; None where it has no tokeniser."""

    def memory_bytes(self) -> int:
        """Bytes that the model's weights take."""


def model_error(error: Exception, directory: Path, doing: str) -> TensorwayError:
    """What a model's exception means to the caller: INVALID_ARGUMENT if the model says so, OutOfMemory where memory ran out, else
    ModelFailed with its own words.

    The message ends with the last frame inside the author's files, e.g. `(model.py:12 in forward)`.
    """
    if isinstance(error, TensorwayError):
        return error
    if isinstance(error, InvalidInput):
        return InvalidRequest(str(error), field=error.field)
    text = str(error).strip() or "no message"
    if _is_out_of_memory(error):
        return OutOfMemory(f"{doing} ran out of memory: {text.splitlines()[0]}")
    return ModelFailed(f"{doing} raised {type(error).__name__}: {text}{_authors_frame(error, directory)}")


def _is_out_of_memory(error: Exception) -> bool:
    """torch has a type of its own for a device's memory, and only words for the host's (c10/core/impl/alloc_cpu.cpp)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "not enough memory" in str(error))


def _authors_frame(error: Exception, directory: Path) -> str:
    root = str(directory.resolve())
    found = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename.startswith(root):
            found = f" ({Path(code.co_filename).relative_to(root)}:{trace.tb_lineno} in {code.co_name})"
        trace = trace.tb_next
    return found

"""What a model author writes against.

    from tensorway.model import Model, ModelContext

    class Doubler(Model):
        def load(self, context: ModelContext) -> None:
            self.factor = context.settings.get("factor", 2.0)

        def forward(self, inputs):
            return {"output": inputs["input"] * self.factor}

A model lives in the worker's rank process. `load` and `forward` run in the rank's one torch thread, under `torch.inference_mode()`;
`preprocess` and `postprocess` run in a staging thread while the previous step is still busy. None of them needs to know what gRPC is.

Tensors are `torch.Tensor`; a BYTES tensor is a numpy array of dtype object whose elements are `bytes`. This module imports neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tensorway.model_directory import FILES_DIR
from tensorway.signature import Signature

if TYPE_CHECKING:
    import numpy
    import torch

    #: What a model takes and returns: a torch tensor, or for BYTES a numpy object array of `bytes`.
    Value: TypeAlias = torch.Tensor | numpy.ndarray[Any, Any]
    Inputs: TypeAlias = dict[str, Value]
    Outputs: TypeAlias = dict[str, Value]
else:
    Value = Inputs = Outputs = Any

#: A value of a request's `parameters`.
Parameter: TypeAlias = bool | int | float | str
Parameters: TypeAlias = Mapping[str, Parameter]


class InvalidInput(ValueError):
    """The caller's fault: raise it from `preprocess`, `forward` or `postprocess` and that request fails with INVALID_ARGUMENT.

    `field` is the path of what is wrong, e.g. `inputs.image[2]`.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class ModelContext:
    """What a model is told when it is loaded."""

    #: The model's directory.
    directory: Path
    #: `settings` of model.yaml, as they stand there.
    settings: Mapping[str, Any]
    #: Names, dtypes and shapes of the request's tensors.
    signature: Signature
    #: `cpu` or `cuda:N`: where `forward` gets its tensors.
    device: str
    #: Element type of floating-point weights: `keep`, `float32`, `bfloat16` or `float16`; `load_weights` already obeys it.
    weights_dtype: str = "keep"
    _load_weights: Callable[[Path], dict[str, Any]] | None = field(default=None, repr=False)
    _load_into: Callable[[Any, Path, str], None] | None = field(default=None, repr=False)

    def file(self, path: str) -> Path:
        """Where the declared file `path` lies. Raises FileNotFoundError saying how to fetch it."""
        found = self.directory / FILES_DIR / path
        if not found.is_file():
            raise FileNotFoundError(f"{found} is not there; run `tensorway models fetch` first")
        return found

    def load_weights(self, path: str) -> dict[str, torch.Tensor]:
        """The tensors of a declared weights file (safetensors, or a torch state dict), on `device`, in `weights_dtype`.

        A torch file is read with `weights_only=True`, unless `settings.unpickle` lists it by name.
        """
        if self._load_weights is None:
            raise RuntimeError("this context was made without a weights loader")
        return self._load_weights(self.file(path))

    def load_into(self, module: torch.nn.Module, path: str, prefix: str = "") -> None:
        """Fills a module's parameters and buffers from a declared weights file, on `device`, in `weights_dtype`.

        Works with any `parallel`: where the model is cut, every rank builds the module without memory, this call only notes which file its
        weights are in, and after the cut each rank reads its own part of the file. So use the weights in `forward`, not in `load`.

        Args:
            module: held by an attribute of the model, or by one of its `stages`. Afterwards in evaluation mode, without gradients.
            path: a declared file: safetensors (also several by their index), GGUF, or a torch state dict.
            prefix: what the file's names have in front of the module's own, e.g. `encoder.`.

        Raises FailedPrecondition where the file lacks one of the module's weights.
        """
        if self._load_into is None:
            raise RuntimeError("this context was made without a weights loader")
        self._load_into(module, self.file(path), prefix)


class Model:
    """Base of an author's model. Only `forward` must be written.

    Requests of one batch are joined along dimension 0 before `forward` and its outputs are cut apart again, so `forward` must treat
    rows independently. It owns its inputs and may write into them. The tensors that it returns must not be written to afterwards (no
    reused output buffers): their bytes are on their way to the caller while the next step runs.
    """

    #: Padding rules for the names that `preprocess` returns: name -> value of the added elements. Adds to `batching.padding` of model.yaml.
    padding: Mapping[str, float] = {}
    #: Threads that may run `preprocess` of different requests at once; more than 1 asks that it be thread-safe.
    preprocess_threads: int = 1

    def load(self, context: ModelContext) -> None:
        """Reads weights and gets ready. Anything raised here ends the rank with that message."""

    def forward(self, inputs: Inputs) -> Outputs:
        """One step.

        Args:
            inputs: what the signature (or `preprocess`) names, joined along dimension 0; a tensor that varies in other dimensions is
                padded to the longest request where a rule says so.

        Returns:
            What the signature's outputs (or `postprocess`) ask for: same rows, in the same order, exactly the declared dtypes.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def preprocess(self, inputs: Inputs, parameters: Parameters) -> Inputs:
        """Turns one request's inputs into what `forward` takes; names and shapes may change. Raise InvalidInput to refuse the request."""
        return inputs

    def postprocess(self, outputs: Outputs, parameters: Parameters) -> Outputs:
        """Turns one request's slice of the outputs into what the signature declares. Raise InvalidInput to refuse the request.

        A plain value (bool, int, float or str) in what it returns becomes a parameter of the response.
        """
        return outputs

    def example(self, rows: int) -> Inputs | None:
        """What `forward` takes, with `rows` rows, for warming up; None has it made from zeros by the signature and `preprocess`."""
        return None

    def stages(self) -> Sequence[torch.nn.Module]:
        """The model as consecutive modules: how it may be cut into pipeline stages. Called after `load`.

        The first takes `forward`'s dictionary of inputs, the last returns its dictionary of outputs; in between, each takes what the one
        before returned: a tensor, a tuple of tensors or a dictionary of tensors. One after the other they must do what `forward` does. A
        rank runs a run of them, so give at least as many as `parallel.pipeline`; more let Tensorway balance the ranks.

        None (an empty sequence): where `parallel` asks for it, Tensorway looks for places at which `forward` can be cut by itself.
        """
        return ()

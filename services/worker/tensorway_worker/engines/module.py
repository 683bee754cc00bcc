"""What TorchScript and torch.export programs have in common: a module called with positional tensors, named by the signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from tensorway.errors import FailedPrecondition, ModelFailed
from tensorway.model import Inputs, Outputs, Parameters, Value
from tensorway.model_directory import ModelDirectory
from tensorway_worker.engines.authored import import_model_py
from tensorway_worker.engines.weights import module_bytes

#: The author's hook: `call(module, inputs) -> outputs by name`, for a module that wants more than tensors in order.
CallHook = Callable[[torch.nn.Module, Inputs], Outputs]


class ModuleLoader(Protocol):
    """Reads a module from a file onto a device."""

    def __call__(self, path: Path, device: str) -> torch.nn.Module: ...


class ModuleEngine:
    """A saved module. `settings.file` names it, `settings.arguments` the order of its inputs (default: the signature's).

    Its result may be a tensor (the only output), a sequence (outputs in the signature's order) or a mapping by name. A `model.py`
    with a function `call(module, inputs)` takes the calling over.
    """

    has_preprocess = False
    has_postprocess = False
    preprocess_threads = 1

    def __init__(self, directory: ModelDirectory, device: str, load_module: ModuleLoader) -> None:
        settings = directory.yaml.settings
        self.device = device
        self.padding: Mapping[str, float] = {}
        self._directory = directory
        self._load_module = load_module
        signature = directory.spec.signature
        self._outputs = tuple(spec.name for spec in signature.outputs)
        declared = tuple(spec.name for spec in signature.inputs)
        self._arguments: tuple[str, ...] = tuple(settings.get("arguments", declared))
        if sorted(self._arguments) != sorted(declared):
            raise FailedPrecondition(
                f"settings.arguments must order the inputs {list(declared)}, got {list(self._arguments)}", field="settings.arguments"
            )
        hook = import_model_py(directory.path)
        self._call: CallHook | None = getattr(hook, "call", None)
        if hook is not None and self._call is None:
            raise FailedPrecondition("model.py of a saved module must define `call(module, inputs)`", field="model.py")
        self._module: torch.nn.Module | None = None

    def load(self) -> None:
        name = self._directory.yaml.settings.get("file")
        if not isinstance(name, str):
            raise FailedPrecondition("settings.file must name the saved module among `files`", field="settings.file")
        path = self._directory.file(name)
        if not path.is_file():
            path = self._directory.path / name
        if not path.is_file():
            raise FailedPrecondition(f"{name} is neither fetched nor beside model.yaml", field="settings.file")
        # Weights made under inference_mode could not take part in a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            self._module = self._load_module(path, self.device)

    def run(self, inputs: Inputs) -> Outputs:
        module = self._module
        if module is None:
            raise ModelFailed("the module is not loaded")
        if self._call is not None:
            return self._call(module, inputs)
        return self._named(module(*(inputs[name] for name in self._arguments)))

    def preprocess(self, inputs: Inputs, parameters: Parameters) -> Inputs:
        return inputs

    def postprocess(self, outputs: Outputs, parameters: Parameters) -> Outputs:
        return outputs

    def example(self, rows: int) -> Inputs | None:
        return None

    def embedding(self, name: str) -> torch.nn.Module | None:
        return None

    def tokens(self, name: str, value: Value) -> Value | None:
        return None

    def memory_bytes(self) -> int:
        return 0 if self._module is None else module_bytes(self._module)

    def _named(self, result: Any) -> Outputs:
        if isinstance(result, torch.Tensor):
            result = (result,)
        if isinstance(result, Mapping):
            return dict(result)
        if isinstance(result, Sequence) and len(result) == len(self._outputs):
            return dict(zip(self._outputs, result, strict=True))
        raise ModelFailed(f"the module returned {_kind(result)}, the signature declares {list(self._outputs)}")


def _kind(result: Any) -> str:
    return f"{len(result)} values" if isinstance(result, Sequence) else f"a {type(result).__name__}"

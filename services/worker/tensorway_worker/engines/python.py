"""Engine `python`: an author's `Model` class in `model.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType

import torch

from tensorway.errors import FailedPrecondition
from tensorway.model import Inputs, Model, ModelContext, Outputs, Parameters
from tensorway.model_directory import ModelDirectory
from tensorway_worker.engines.authored import MODEL_PY, import_model_py
from tensorway_worker.engines.weights import load_weights, module_bytes


class PythonEngine:
    """Runs the class named by `settings.class`, or the only `Model` subclass that `model.py` defines."""

    def __init__(self, directory: ModelDirectory, device: str) -> None:
        """Imports `model.py`; the class is known from here on, its weights only after `load`."""
        settings = directory.yaml.settings
        self.device = device
        module = import_model_py(directory.path)
        if module is None:
            raise FailedPrecondition(f"{directory.path}: engine python needs a {MODEL_PY}", field=MODEL_PY)
        kind = _model_class(module, settings.get("class"))
        self._model = kind()
        self._context = ModelContext(
            directory=directory.path,
            settings=settings,
            signature=directory.spec.signature,
            device=device,
            weights_dtype=directory.yaml.weights_dtype,
            _load_weights=partial(
                load_weights, device=device, weights_dtype=directory.yaml.weights_dtype, unpickle=settings.get("unpickle", ())
            ),
        )
        self.has_preprocess = kind.preprocess is not Model.preprocess
        self.has_postprocess = kind.postprocess is not Model.postprocess
        self.preprocess_threads = kind.preprocess_threads
        self.padding: Mapping[str, float] = {}
        # Bound once: the hot path goes straight to the author's function.
        self.run: Callable[[Inputs], Outputs] = self._model.forward

    def load(self) -> None:
        self._model.load(self._context)
        self.padding = dict(self._model.padding)

    def preprocess(self, inputs: Inputs, parameters: Parameters) -> Inputs:
        return self._model.preprocess(inputs, parameters)

    def postprocess(self, outputs: Outputs, parameters: Parameters) -> Outputs:
        return self._model.postprocess(outputs, parameters)

    def example(self, rows: int) -> Inputs | None:
        return self._model.example(rows)

    def embedding(self, name: str) -> torch.nn.Module | None:
        return None

    def memory_bytes(self) -> int:
        modules = [value for value in vars(self._model).values() if isinstance(value, torch.nn.Module)]
        return sum(map(module_bytes, modules))


def _model_class(module: ModuleType, name: object) -> type[Model]:
    if name is not None:
        kind = getattr(module, str(name), None)
        if not (isinstance(kind, type) and issubclass(kind, Model)):
            raise FailedPrecondition(f"settings.class: {MODEL_PY} has no Model subclass {name!r}", field="settings.class")
        return kind
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Model) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise FailedPrecondition(
            f"{MODEL_PY} must define exactly one Model subclass, or settings.class name one; found: {names}", field="settings.class"
        )
    return found[0]

"""Engine `python`: an author's `Model` class in `model.py`, whole or a part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, Final

import torch

from tensorway.errors import FailedPrecondition
from tensorway.model import Inputs, Model, ModelContext, Outputs, Parameters, Value
from tensorway.model_directory import FILES_DIR, ModelDirectory
from tensorway_worker.engines.authored import MODEL_PY, import_model_py
from tensorway_worker.engines.cut.assembly import Uncut, assembled
from tensorway_worker.engines.cut.chain import ChainStage
from tensorway_worker.engines.cut.empty import without_memory
from tensorway_worker.engines.cut.own_weights import Names, held_bytes, tied_names
from tensorway_worker.engines.cut.tensor_plan import plan_of
from tensorway_worker.engines.cut.weights_source import Slice
from tensorway_worker.engines.embedded import embedding_of
from tensorway_worker.engines.loading import Origin, PartLoading, WholeLoading, modules_of
from tensorway_worker.engines.port import Cut
from tensorway_worker.engines.rewriting import AuthoredFiles, HeldWeight, Rewriting, held, refuse_unread
from tensorway_worker.engines.samples import sample_inputs
from tensorway_worker.engines.weights import load_weights

_SIZED_ROWS: Final = 8


class PythonEngine:
    """Runs the class named by `settings.class`, or the only `Model` subclass that `model.py` defines. Implements `Engine`."""

    def __init__(self, directory: ModelDirectory, device: str, cut: Cut | None = None) -> None:
        """Imports `model.py`; the class is known from here on, its weights only after `load`."""
        settings = directory.yaml.settings
        self.device = device
        self._directory = directory
        self._cut = cut
        module = import_model_py(directory.path)
        if module is None:
            raise FailedPrecondition(f"{directory.path}: engine python needs a {MODEL_PY}", field=MODEL_PY)
        kind = _model_class(module, settings.get("class"))
        self._model = kind()
        self.has_preprocess = kind.preprocess is not Model.preprocess
        self.has_postprocess = kind.postprocess is not Model.postprocess
        self.preprocess_threads = kind.preprocess_threads
        self.padding: Mapping[str, float] = {}
        self._loading = PartLoading(device, directory.yaml.weights_dtype, ())
        self._whole_loading: WholeLoading | None = None
        #: Of a cut model: every weight's names in the whole one, where they are read from, and the slices that this rank holds.
        self._names: Names = {}
        self._origins: Mapping[str, Origin] = {}
        self._slices: Mapping[str, Slice] = {}
        #: What the cut model's modules hang on; None for a whole model.
        self._root: torch.nn.Module | None = None
        self._embeddings: dict[str, torch.nn.Module | None] = {}
        # Bound once: the hot path goes straight to the author's function.
        self.run: Callable[[Inputs], Outputs] = self._model.forward

    def load(self) -> None:
        # Weights made under inference_mode could not take part in a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            if self._cut is None:
                self._load_whole()
            else:
                self._load_part(self._cut)

    def _load_whole(self) -> None:
        dtype, unpickle = self._directory.yaml.weights_dtype, self._directory.yaml.settings.get("unpickle", ())
        whole = partial(load_weights, device=self.device, weights_dtype=dtype, unpickle=unpickle)
        self._whole_loading = loading = WholeLoading(self.device, dtype, unpickle)
        self._model.load(self._context(whole, loading.into))
        self.padding = dict(self._model.padding)

    def uncut(self, rows: int = 0) -> Uncut:
        """The model without memory for its weights and all that is needed to cut it; afterwards it is this engine's model.

        `rows`: of the sized example; 0 takes a few.
        """
        yaml = self._directory.yaml
        self._loading = loading = PartLoading(self.device, yaml.weights_dtype, yaml.settings.get("unpickle", ()))
        with without_memory():
            self._model.load(self._context(loading.refuse_whole, loading.into))
        self.padding = dict(self._model.padding)
        stages = tuple(self._model.stages())
        self._root = root = torch.nn.ModuleList(stages) if stages else torch.nn.ModuleDict(dict(modules_of(self._model)))
        if not any(True for _ in root.parameters()):
            raise FailedPrecondition(
                f"{yaml.name}: nothing to cut: the model holds no torch.nn.Module with parameters in its attributes, and gives no stages()",
                field="parallel",
            )
        call = ChainStage(stages, 0, len(stages)) if stages else self._model.forward
        spec = self._directory.spec
        return Uncut(
            name=yaml.name,
            root=root.eval(),
            call=call,
            example=sample_inputs(self, spec, 3),
            sized_example=sample_inputs(self, spec, rows or min(_SIZED_ROWS, yaml.batching.max_rows)),
            device=self.device,
            tensor_plan=plan_of(root, yaml.settings.get("tensor_plan")),
            is_chain=bool(stages),
        )

    def _load_part(self, cut: Cut) -> None:
        uncut = self.uncut()
        self._names, self._origins = tied_names(uncut.root), self._loading.origins(uncut.root)
        part = assembled(uncut, cut, self._loading.reads(uncut.root))
        self._slices = part.sharding.slices
        if not uncut.is_chain:
            # Layers that were replaced by this shard's must be what the author's code finds.
            for name, module in uncut.root.named_children():
                setattr(self._model, name, module)
        self.run = part.stage
        self._embeddings = dict(part.embeddings)

    def _context(self, load_weights: Callable[..., dict[str, Any]], load_into: Callable[..., None]) -> ModelContext:
        return ModelContext(
            directory=self._directory.path,
            settings=self._directory.yaml.settings,
            signature=self._directory.spec.signature,
            device=self.device,
            weights_dtype=self._directory.yaml.weights_dtype,
            _load_weights=load_weights,
            _load_into=load_into,
        )

    def preprocess(self, inputs: Inputs, parameters: Parameters) -> Inputs:
        return self._model.preprocess(inputs, parameters)

    def postprocess(self, outputs: Outputs, parameters: Parameters) -> Outputs:
        return self._model.postprocess(outputs, parameters)

    def example(self, rows: int) -> Inputs | None:
        return self._model.example(rows)

    def embedding(self, name: str) -> torch.nn.Module | None:
        if self._root is None and name not in self._embeddings:
            example = sample_inputs(self, self._directory.spec, 1)
            self._embeddings[name] = embedding_of(modules_of(self._model).values(), self.run, example, name, self.device)
        return self._embeddings.get(name)

    def tokens(self, name: str, value: Value) -> Value | None:
        return None

    def held_weights(self) -> Sequence[HeldWeight]:
        """See `tensorway_worker.engines.rewriting.Adaptable`."""
        files = self._files()
        if self._root is not None:
            origins = self._origins
            return held(
                self._root, self._names, self._slices,
                lambda name: files.stored(origins[name].path, "", origins[name].name) if name in origins else (),
            )
        found: list[HeldWeight] = []
        for module, path, prefix in self._whole_loading.filled if self._whole_loading is not None else ():
            found += held(module, tied_names(module), {}, partial(files.stored, path, prefix))
        refuse_unread(self._modules(), found)
        return found

    def rewriting(self) -> Rewriting:
        """See `tensorway_worker.engines.rewriting.Adaptable`."""
        return self._files().rewriting()

    def _files(self) -> AuthoredFiles:
        filled = self._whole_loading.filled if self._whole_loading is not None else ()
        paths = [*(path for _, path, _ in filled), *(origin.path for origin in self._origins.values())]
        return AuthoredFiles(self._directory.path / FILES_DIR, self._directory.yaml.settings.get("unpickle", ()), paths)

    def _modules(self) -> list[torch.nn.Module]:
        return [*modules_of(self._model).values(), *self._model.stages()]

    def memory_bytes(self) -> int:
        return held_bytes(self._root if self._root is not None else torch.nn.ModuleList(modules_of(self._model).values()))


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

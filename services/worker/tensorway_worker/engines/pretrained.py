"""Making a transformers model: from its own files, from a class and a seed, or without memory for its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tensorway.errors import FailedPrecondition
from tensorway.model_directory import FILES_DIR, ModelDirectory
from tensorway_worker.engines.cut.empty import without_memory
from tensorway_worker.engines.cut.own_weights import Read, align, fill, kept_of, reader, tied_names
from tensorway_worker.engines.cut.weights_source import open_weights
from tensorway_worker.engines.tasks import Task
from tensorway_worker.engines.weights import DTYPES, load_weights


class Pretrained:
    """The transformers model of one directory; the settings are those of `tensorway_worker.engines.transformers`."""

    def __init__(self, directory: ModelDirectory, task: Task) -> None:
        self._directory = directory
        self._settings = directory.yaml.settings
        self._task = task
        self._dtype = DTYPES.get(directory.yaml.weights_dtype)
        self._unpickle: tuple[str, ...] = tuple(self._settings.get("unpickle", ()))

    @property
    def dtype(self) -> torch.dtype | None:
        """What model.yaml has floating-point weights turned into; None keeps them as stored."""
        return self._dtype

    @property
    def unpickle(self) -> tuple[str, ...]:
        """Names of files that may be unpickled in full."""
        return self._unpickle

    @property
    def files(self) -> Path:
        """Where config.json, weights and tokeniser lie."""
        return self._directory.path / FILES_DIR / str(self._settings.get("directory", ""))

    @property
    def weights(self) -> Path | None:
        """The weights file that `settings.weights` names; None where it names none."""
        name = self._settings.get("weights")
        return None if not name else self._directory.file(str(name))

    @property
    def is_built_whole(self) -> bool:
        """Whether its weights are in no file, but come from a seed: then even a rank that keeps a part has to make all of them first."""
        return bool(self._settings.get("architecture")) and self.weights is None

    def whole(self, device: str) -> Any:
        """The model with its weights, on `device`."""
        if self._settings.get("architecture"):
            return self._made().to(device)
        if self.weights is None:
            extra = {} if self._dtype is None else {"dtype": self._dtype}
            kind = getattr(transformers, self._task.auto)
            mapped = kind.from_pretrained(self.files, local_files_only=True, use_safetensors=True, **extra)
            align(mapped)
            return mapped.to(device)
        model = self.empty()
        names = tied_names(model)
        fill(model, names, names, {}, self.read(model, device), device)
        return model

    def empty(self) -> Any:
        """The model without memory for its weights, in evaluation mode. Buffers that its own code computes are real."""
        architecture = self._settings.get("architecture")
        with without_memory():
            if architecture:
                kind = self._architecture(str(architecture))
                model = kind(kind.config_class(**self._settings.get("config", {})))
                model = model.to(self._dtype) if self._dtype is not None else model
            else:
                config = self._config()
                dtype = self._dtype or getattr(config, "dtype", None)
                extra = {} if dtype is None else {"dtype": dtype}
                model = getattr(transformers, self._task.auto).from_config(config, **extra)
        # Building without memory makes every parameter anew, and tied ones two.
        model.tie_weights()
        return model.eval()

    def read(self, model: Any, device: str) -> Read:
        """Reads single weights of `model`, as `empty` made it. Where no file holds them, makes the whole model first."""
        if self.is_built_whole:
            return kept_of(self.made_state(), device)
        source = open_weights(self.weights or self.files, self._unpickle, model)
        return reader(source, self._dtype or getattr(model.config, "dtype", None), device)

    def made_state(self) -> dict[str, torch.Tensor]:
        """All weights of a model that comes from a seed."""
        state: dict[str, torch.Tensor] = self._made().state_dict()
        return state

    def _config(self) -> Any:
        weights = self.weights
        if weights is not None and weights.suffix == ".gguf" and not (self.files / "config.json").is_file():
            from tensorway_worker.engines.cut.gguf_source import gguf_config

            return gguf_config(weights)
        return transformers.AutoConfig.from_pretrained(self.files, local_files_only=True)

    def _architecture(self, name: str) -> Any:
        kind = getattr(transformers, name, None)
        if kind is None or not hasattr(kind, "config_class"):
            raise FailedPrecondition(f"settings.architecture: transformers has no model {name!r}", field="settings.architecture")
        return kind

    def _made(self) -> Any:
        kind = self._architecture(str(self._settings["architecture"]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self._settings.get("seed", 0)))
            model = kind(kind.config_class(**self._settings.get("config", {})))
        if self.weights is not None:
            model.load_state_dict(load_weights(self.weights, "cpu", "keep", self._unpickle))
        return model.eval() if self._dtype is None else model.eval().to(self._dtype)

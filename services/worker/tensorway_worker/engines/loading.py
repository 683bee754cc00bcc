"""Where an author's `context.load_into` finds weights: at once in a whole model, later and only its own part in a rank of a cut group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tensorway.errors import FailedPrecondition
from tensorway_worker.engines.cut.own_weights import Read, fill, tied_names
from tensorway_worker.engines.cut.weights_source import Slice, WeightsSource, open_weights
from tensorway_worker.engines.weights import DTYPES


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one weight is read from."""

    path: Path
    name: str


class WholeLoading:
    """Fills a module's weights at once, one tensor at a time."""

    def __init__(self, device: str, weights_dtype: str, unpickle: Sequence[str]) -> None:
        self._device = device
        self._dtype = DTYPES.get(weights_dtype)
        self._unpickle = tuple(unpickle)
        #: What was filled: (module, file, prefix).
        self.filled: list[tuple[torch.nn.Module, Path, str]] = []

    def into(self, module: torch.nn.Module, path: Path, prefix: str) -> None:
        """`ModelContext.load_into` of a whole model."""
        self.filled.append((module, path, prefix))
        source = open_weights(path, self._unpickle)
        names = tied_names(module)

        def read(same: Sequence[str], part: Slice | None) -> torch.Tensor | None:
            origins = [Origin(path, prefix + name) for name in same]
            return _load(source, origins, part, self._dtype, self._device)

        fill(module, names, names, {}, read, self._device)
        module.eval().requires_grad_(False)


class PartLoading:
    """Notes what is to be read; `read` gives it, once it is known which part is this rank's."""

    def __init__(self, device: str, weights_dtype: str, unpickle: Sequence[str]) -> None:
        self._device = device
        self._dtype = DTYPES.get(weights_dtype)
        self._unpickle = tuple(unpickle)
        #: Identity of a weight as `load` left it -> where it is read from; the weights are kept, so no identity is given twice.
        self._origins: dict[int, tuple[torch.Tensor, Origin]] = {}
        self._sources: dict[Path, WeightsSource] = {}

    def into(self, module: torch.nn.Module, path: Path, prefix: str) -> None:
        """`ModelContext.load_into` in a cut group."""
        persistent = module.state_dict(keep_vars=True)
        for name, tensor in persistent.items():
            self._origins.setdefault(id(tensor), (tensor, Origin(path, prefix + name)))
        module.eval().requires_grad_(False)

    def refuse_whole(self, path: Path) -> dict[str, Any]:
        """`ModelContext.load_weights` in a cut group."""
        raise FailedPrecondition(
            f"load_weights({path.name!r}) reads the whole file, and this rank holds only a part of the model: use "
            f"context.load_into(module, {path.name!r}) instead",
            field="model.py",
        )

    def origins(self, root: torch.nn.Module) -> dict[str, Origin]:
        """Where each weight of `root`, by its name there, is read from; as long as they are those that `load` saw."""
        weights = (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))
        return {name: self._origins[id(tensor)][1] for name, tensor in weights if id(tensor) in self._origins}

    def reads(self, root: torch.nn.Module) -> Callable[[], Read]:
        """Reads by the names of `root`, whose weights must still be those that `load` saw."""
        origins = self.origins(root)

        def read(same: Sequence[str], part: Slice | None) -> torch.Tensor | None:
            known = [origins[name] for name in same if name in origins]
            return _load(self._source(known[0].path), known, part, self._dtype, self._device) if known else None

        return lambda: read

    def _source(self, path: Path) -> WeightsSource:
        if path not in self._sources:
            self._sources[path] = open_weights(path, self._unpickle)
        return self._sources[path]


def _load(
    source: WeightsSource, origins: Sequence[Origin], part: Slice | None, dtype: torch.dtype | None, device: str
) -> torch.Tensor:
    there = source.names()
    found = next((origin for origin in origins if origin.name in there), origins[0])
    if found.name not in there:
        raise FailedPrecondition(
            f"load_into: {found.path.name} holds no {found.name}; does it need another prefix, or is it another model's file?",
            field="files",
        )
    return source.load(found.name, part, dtype, device)


def modules_of(model: object) -> Mapping[str, torch.nn.Module]:
    """The modules that an author's model holds in its attributes."""
    return {name: value for name, value in vars(model).items() if isinstance(value, torch.nn.Module)}

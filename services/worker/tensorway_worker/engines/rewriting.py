"""Trained weights back into files: which weights a rank holds, what their files call them, and which files are to be written anew.

An engine whose weights can be written implements `Adaptable`. Names in the new files are those of the old ones, so that the same engine
and the same `model.py` load them; weights that came from a GGUF file or from a seed get transformers' own names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import torch

from tensorway.errors import FailedPrecondition
from tensorway_worker.engines.cut.own_weights import Names
from tensorway_worker.engines.cut.renamed_source import RenamedSource
from tensorway_worker.engines.cut.weights_source import Slice, WeightsSource, checkpoint_in, open_weights, settled

if TYPE_CHECKING:
    from tensorway_worker.engines.pretrained import Pretrained

_INDEX_SUFFIX: Final = ".safetensors.index.json"
#: What transformers calls a checkpoint.
_CHECKPOINT: Final = "model.safetensors"
#: Whole dtypes that gradients can be taken in.
TRAINABLE: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a whole weight lies in the files of the new directory."""

    #: Under files/.
    file: str
    #: In that file.
    name: str


@dataclass(frozen=True, slots=True)
class HeldWeight:
    """One floating-point parameter in this rank's memory."""

    parameter: torch.nn.Parameter
    #: Every name that it has in the model: tied weights have several, wherever in the group they are held.
    names: tuple[str, ...]
    stored: tuple[Stored, ...]
    #: What of the whole it is; None for all of it.
    part: Slice | None = None


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """One file to be written anew."""

    #: Under files/. Its ending says the format.
    path: str
    #: Opens what it holds so far.
    open: Callable[[], WeightsSource]
    #: What floating-point tensors are written as; None: as they are stored.
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Rewriting:
    """How a model directory changes when its weights do."""

    files: tuple[WeightsFile, ...]
    #: Files, under files/, that the new ones take the place of.
    dropped: tuple[str, ...] = ()
    #: Changes of model.yaml's settings.
    settings: Mapping[str, Any] = field(default_factory=dict)
    #: Further new files, under files/: path -> text.
    added: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Adaptable(Protocol):
    """An engine whose weights can be trained and written."""

    def held_weights(self) -> Sequence[HeldWeight]:
        """This rank's floating-point parameters, equal ones of all shards in the same order. Raises FailedPrecondition where one of them
        could not be written back."""

    def rewriting(self) -> Rewriting:
        """What has to be written. Raises FailedPrecondition where it cannot be."""


class StateOf:
    """The weights of a whole model in memory. Implements `WeightsSource`."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = state

    def names(self) -> Collection[str]:
        return self._state.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def load(self, name: str, part: Slice | None, dtype: torch.dtype | None, device: str) -> torch.Tensor:
        found = self._state[name].detach()
        return settled(found if part is None else found[part.index()], dtype, device)


def held(root: torch.nn.Module, names: Names, slices: Mapping[str, Slice], stored: Callable[[str], Sequence[Stored]]) -> list[HeldWeight]:
    """The parameters of `root` that lie in memory. `stored` tells where a model's weight lies in the files.

    Raises FailedPrecondition naming one that lies nowhere.
    """
    found: list[HeldWeight] = []
    for name, parameter in root.named_parameters():
        if parameter.is_meta or parameter.dtype not in TRAINABLE:
            continue
        same = names.get(name, (name,))
        places = tuple(dict.fromkeys(place for one in sorted(same) for place in stored(one)))
        if not places:
            raise _nameless(name)
        found.append(HeldWeight(parameter, tuple(sorted(same)), places, slices.get(name)))
    return found


def refuse_unread(modules: Iterable[torch.nn.Module], known: Iterable[HeldWeight]) -> None:
    """Raises FailedPrecondition naming a parameter of `modules` that is none of `known`: it was not read by `load_into`."""
    ours = {id(one.parameter) for one in known}
    for module in modules:
        for name, parameter in module.named_parameters():
            if id(parameter) not in ours and parameter.dtype in TRAINABLE:
                raise _nameless(name)


def _nameless(name: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{name} comes from no weights file by its name, so it cannot be written back: have model.py read its weights with "
        "context.load_into",
        field="model.py",
    )


def files_of(path: Path, files: Path, unpickle: Sequence[str]) -> tuple[tuple[WeightsFile, ...], dict[str, str]]:
    """The files of a checkpoint (one, or all of an index) to be written anew, and the file of each stored name, under `files`.

    Raises FailedPrecondition for formats that are not written.
    """
    if path.suffix == ".gguf":
        raise FailedPrecondition(
            f"{path.name} is quantised, and model.py asks for it by this name: convert it to safetensors first", field="files"
        )
    if not path.name.endswith(_INDEX_SUFFIX):
        target = path.relative_to(files).as_posix()
        source = open_weights(path, unpickle)
        return (WeightsFile(target, lambda: source),), dict.fromkeys(source.names(), target)
    weight_map: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    folder = path.parent.relative_to(files)
    made = tuple(_part_of_index(path.parent / name, (folder / name).as_posix(), unpickle) for name in sorted(set(weight_map.values())))
    return made, {name: (folder / file).as_posix() for name, file in weight_map.items()}


def _part_of_index(path: Path, target: str, unpickle: Sequence[str]) -> WeightsFile:
    return WeightsFile(target, lambda: open_weights(path, unpickle))


class PretrainedFiles:
    """The weights files of a transformers model."""

    def __init__(self, pretrained: Pretrained, model: Any, files: Path) -> None:
        """`model`: whole or in parts, on any device; `files`: the directory's files/."""
        self._pretrained = pretrained
        self._model = model
        self._root = files
        self._folder = pretrained.files.relative_to(files)
        weights = pretrained.weights
        self._is_new = pretrained.is_built_whole or (weights is not None and weights.suffix == ".gguf")
        self._stored_name: Callable[[str], str | None] = lambda name: name
        self._path = self._new_path(weights, files)
        self._file_of: Mapping[str, str] = {}
        self._files: tuple[WeightsFile, ...] = ()
        if not self._is_new:
            path = weights or checkpoint_in(pretrained.files)
            self._files, self._file_of = files_of(path, files, pretrained.unpickle)
            renamed = open_weights(path, pretrained.unpickle, model)
            if isinstance(renamed, RenamedSource):
                self._stored_name = renamed.stored_name

    def _new_path(self, weights: Path | None, files: Path) -> str:
        return (self._folder / _CHECKPOINT if weights is None else weights.relative_to(files).with_suffix(".safetensors")).as_posix()

    def stored(self, name: str) -> Sequence[Stored]:
        """Where the model's weight `name` lies."""
        if self._is_new:
            return (Stored(self._path, name),)
        stored = self._stored_name(name)
        return (Stored(self._file_of[stored], stored),) if stored in self._file_of and stored is not None else ()

    def rewriting(self) -> Rewriting:
        """What has to be written."""
        if not self._is_new:
            return Rewriting(self._files)
        weights = self._pretrained.weights
        if weights is None:
            return Rewriting((WeightsFile(self._path, lambda: StateOf(self._pretrained.made_state())),), (), {"weights": self._path})
        config = (self._folder / "config.json").as_posix()
        added = {} if (self._pretrained.files / "config.json").is_file() else {config: json.dumps(self._model.config.to_dict(), indent=2)}
        source = open_weights(weights, (), self._pretrained.empty())
        dtype = self._pretrained.dtype or getattr(self._model.config, "dtype", None) or torch.float32
        replaced = weights.relative_to(self._root).as_posix()
        return Rewriting((WeightsFile(self._path, lambda: source, dtype),), (replaced,), {"weights": self._path}, added)


class AuthoredFiles:
    """The weights files that an author's `load_into` names, and whose parameters they fill."""

    def __init__(self, files: Path, unpickle: Sequence[str], origins: Iterable[Path]) -> None:
        """`files`: the directory's files/; `origins`: the files that were read. Raises FailedPrecondition for a format not written."""
        self._file_of: dict[Path, dict[str, str]] = {}
        self._files: dict[str, WeightsFile] = {}
        for path in dict.fromkeys(origins):
            made, self._file_of[path] = files_of(path, files, unpickle)
            self._files.update((one.path, one) for one in made)

    def stored(self, path: Path, prefix: str, name: str) -> Sequence[Stored]:
        """Where what was read from `path` as `prefix` + `name` lies."""
        file = self._file_of[path].get(prefix + name)
        return () if file is None else (Stored(file, prefix + name),)

    def rewriting(self) -> Rewriting:
        """What has to be written."""
        return Rewriting(tuple(self._files.values()))

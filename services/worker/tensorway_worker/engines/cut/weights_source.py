"""Weights files read tensor by tensor, or only a slice of a tensor, so that a rank never holds what is not its own.

    source = open_weights(Path("model.safetensors"))
    rows = source.load("encoder.weight", Slice(dim=0, start=128, length=64), torch.bfloat16, "cuda:1")

One adapter for each kind of file: safetensors, a safetensors index over several files, torch state dicts (here), and GGUF
(`gguf_source.py`). Every loaded tensor owns its memory: it neither keeps a file mapped nor the rest of a tensor alive.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from tensorway.errors import FailedPrecondition

#: How the index of a checkpoint in several safetensors files ends.
_INDEX_SUFFIX: Final = ".safetensors.index.json"
#: What transformers calls its checkpoints, in the order in which they are looked for.
_CHECKPOINTS: Final = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class Slice:
    """`length` consecutive elements of a tensor along `dim`, from `start`."""

    dim: int
    start: int
    length: int

    def index(self) -> tuple[slice, ...]:
        """What to index a tensor or array with."""
        return (*(slice(None),) * self.dim, slice(self.start, self.start + self.length))

    def shape_of(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The slice's shape, given the whole tensor's."""
        return (*whole[: self.dim], self.length, *whole[self.dim + 1 :])


class WeightsSource(Protocol):
    """Named tensors that can be read one at a time, or a slice at a time."""

    def names(self) -> Collection[str]:
        """The tensors that are there."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape. Raises FailedPrecondition where there is no such tensor."""

    def load(self, name: str, part: Slice | None, dtype: torch.dtype | None, device: str) -> torch.Tensor:
        """A tensor, or one slice of it, contiguous and in memory of its own.

        Args:
            part: which slice; None for the whole. Only its bytes are read where the file's layout allows it.
            dtype: what a floating-point tensor is turned into; None keeps it as stored (GGUF: float32). Others keep theirs.
            device: where it goes, `cpu` or `cuda:N`.

        Raises FailedPrecondition where there is no such tensor, or the slice reaches past its end.
        """


class SafetensorsFile:
    """One safetensors file, mapped into memory; a slice touches only the pages that it lies on."""

    def __init__(self, path: Path) -> None:
        """Reads the header. Raises FailedPrecondition where that is no safetensors file."""
        from safetensors import SafetensorError, safe_open

        self._path = path
        try:
            self._file: Any = safe_open(path, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise unreadable(path, error) from error
        self._names: frozenset[str] = frozenset(self._file.keys())  # type: ignore[no-untyped-call]

    def names(self) -> Collection[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        check_name(self._path, self._names, name)
        return tuple(self._file.get_slice(name).get_shape())

    def load(self, name: str, part: Slice | None, dtype: torch.dtype | None, device: str) -> torch.Tensor:
        check_slice(self._path, name, self.shape(name), part)
        found = self._file.get_tensor(name) if part is None else self._file.get_slice(name)[part.index()]
        return settled(found, dtype, device)


class SafetensorsIndex:
    """A checkpoint in several safetensors files, by its `model.safetensors.index.json`; a file is opened when it is first asked for."""

    def __init__(self, path: Path) -> None:
        """Reads the index. Raises FailedPrecondition where it is none, or names a file that lies elsewhere."""
        self._path = path
        try:
            self._file_of: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise unreadable(path, error) from error
        outside = sorted({file for file in self._file_of.values() if Path(file).name != file})
        if outside:
            raise FailedPrecondition(f"{path.name}: weight_map must name files that lie beside it, not {outside[0]!r}", field="files")
        self._files: dict[str, SafetensorsFile] = {}

    def names(self) -> Collection[str]:
        return self._file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._holding(name).shape(name)

    def load(self, name: str, part: Slice | None, dtype: torch.dtype | None, device: str) -> torch.Tensor:
        return self._holding(name).load(name, part, dtype, device)

    def _holding(self, name: str) -> SafetensorsFile:
        check_name(self._path, self._file_of, name)
        file = self._file_of[name]
        if file not in self._files:
            self._files[file] = SafetensorsFile(self._path.parent / file)
        return self._files[file]


class StateDict:
    """A torch state dict. Files in torch's zip format are mapped, not read; the legacy format is read whole, as it must be."""

    def __init__(self, path: Path, may_unpickle: bool) -> None:
        """Raises FailedPrecondition where it holds more than tensors and `may_unpickle` is False, or is no state dict."""
        import pickle
        import zipfile

        self._path = path
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=not may_unpickle, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise FailedPrecondition(
                f"{path.name} holds more than tensors; list it under settings.unpickle if you trust whoever made it, or convert it to "
                f"safetensors ({str(error).splitlines()[0]})",
                field="settings.unpickle",
            ) from error
        except (OSError, RuntimeError, EOFError) as error:
            raise unreadable(path, error) from error
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
            raise FailedPrecondition(f"{path.name} is no state dict (name -> tensor), but a {type(loaded).__name__}", field="files")
        self._tensors: Mapping[str, torch.Tensor] = loaded

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        check_name(self._path, self._tensors, name)
        return tuple(self._tensors[name].shape)

    def load(self, name: str, part: Slice | None, dtype: torch.dtype | None, device: str) -> torch.Tensor:
        check_slice(self._path, name, self.shape(name), part)
        found = self._tensors[name].detach()
        return settled(found if part is None else found[part.index()], dtype, device)


def open_weights(path: Path, unpickle: Collection[str] = (), model: torch.nn.Module | None = None) -> WeightsSource:
    """The source of a weights file, by its ending: `.safetensors`, `.safetensors.index.json`, `.gguf`, anything else by `torch.load`.

    Args:
        path: the file, or a folder that holds a checkpoint under one of transformers' usual names.
        unpickle: names of files that may be unpickled in full; every other torch file may hold tensors only.
        model: the transformers model (on the meta device) that the tensors are for. With it, names are the model's own, whatever the
            file calls them (`renamed_for`); GGUF files need none, but then hold what AutoModelForCausalLM would make of them.

    Raises FailedPrecondition where the file is missing, unreadable or needs unpickling that is not allowed.
    """
    if path.is_dir():
        path = checkpoint_in(path)
    if not path.is_file():
        raise FailedPrecondition(f"{path} is not there; run `tensorway models fetch` first", field="files")
    if path.suffix == ".gguf":
        from tensorway_worker.engines.cut.gguf_source import GgufFile

        return GgufFile(path, model)
    source: WeightsSource
    if path.name.endswith(_INDEX_SUFFIX):
        source = SafetensorsIndex(path)
    elif path.suffix == ".safetensors":
        source = SafetensorsFile(path)
    else:
        source = StateDict(path, path.name in unpickle)
    if model is None or not hasattr(model, "base_model_prefix"):
        return source
    from tensorway_worker.engines.cut.renamed_source import renamed_for

    return renamed_for(source, model)


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint in `folder`, by transformers' usual names. Raises FailedPrecondition where there is none."""
    for name in _CHECKPOINTS:
        if (folder / name).is_file():
            return folder / name
    raise FailedPrecondition(f"{folder} holds none of {', '.join(_CHECKPOINTS)}; run `tensorway models fetch` first", field="files")


def settled(found: torch.Tensor, dtype: torch.dtype | None, device: str) -> torch.Tensor:
    """A contiguous copy in memory of its own, of `dtype` if it is floating-point."""
    wanted = dtype if dtype is not None and found.is_floating_point() else found.dtype
    made = torch.empty(found.shape, dtype=wanted, device=device)
    return made.copy_(found)


def check_name(path: Path, names: Collection[str], name: str) -> None:
    """Raises FailedPrecondition where `name` is not among `names`."""
    if name not in names:
        raise FailedPrecondition(f"{path.name} holds no tensor {name!r}; is it the file of this model?", field="files")


def check_slice(path: Path, name: str, shape: Sequence[int], part: Slice | None) -> None:
    """Raises FailedPrecondition where `part` reaches past a tensor of `shape`."""
    if part is not None and not (part.dim < len(shape) and part.start >= 0 and part.start + part.length <= shape[part.dim]):
        raise FailedPrecondition(
            f"{path.name}: {name} is of shape {list(shape)}; it has no elements {part.start} to {part.start + part.length} along "
            f"dimension {part.dim}",
            field="files",
        )


def unreadable(path: Path, error: Exception) -> FailedPrecondition:
    """A weights file that its own library refuses."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return FailedPrecondition(f"{path.name} cannot be read as weights: {said}; fetch it again, or check its ending", field="files")

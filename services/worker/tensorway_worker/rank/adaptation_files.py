"""The weights files of an adapted model: the old ones with the trained weights in their places, one tensor in memory at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import torch

from tensorway.errors import FailedPrecondition, InternalError
from tensorway_worker.engines.cut.weights_source import SafetensorsFile, WeightsSource
from tensorway_worker.engines.rewriting import Rewriting, Stored, WeightsFile

_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Names of safetensors' element types (https://github.com/huggingface/safetensors, "Format").
_DTYPES: Final[Mapping[torch.dtype, str]] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}
#: Room in the header for one tensor besides its name: type, extents, offsets.
_ENTRY_BYTES: Final = 256
_COPY_BYTES: Final = 1 << 22


@dataclass(frozen=True, slots=True)
class _Piece:
    """A trained weight, or a slice of one, in a file that a rank has written."""

    file: SafetensorsFile
    key: str
    #: Dimension, start, length; None for the whole.
    part: tuple[int, int, int] | None


class Trained:
    """What all ranks have written (`Share.save`) into one folder."""

    def __init__(self, folder: Path) -> None:
        self._pieces: dict[Stored, list[_Piece]] = {}
        #: Places of each trained weight, until one of them is written.
        self._unwritten: dict[tuple[str, str], set[Stored]] = {}
        for listed in sorted(folder.glob("rank-*.json")):
            file = SafetensorsFile(listed.with_suffix(".safetensors"))
            for item in json.loads(listed.read_text(encoding="utf-8")):
                piece = _Piece(file, item["key"], None if item["part"] is None else tuple(item["part"]))
                places = {Stored(place["file"], place["name"]) for place in item["stored"]}
                self._unwritten[listed.name, item["key"]] = places
                for place in places:
                    self._pieces.setdefault(place, []).append(piece)

    def whole(self, place: Stored) -> torch.Tensor | None:
        """The trained weight that belongs there, put together from its slices; None where it was not trained."""
        pieces = self._pieces.get(place)
        if pieces is None:
            return None
        self._unwritten = {weight: places for weight, places in self._unwritten.items() if place not in places}
        for piece in pieces:
            # A tied weight may be whole on one rank and cut on others; all hold the same.
            if piece.part is None:
                return piece.file.load(piece.key, None, None, "cpu")
        slices = {piece.part[1]: piece for piece in pieces if piece.part is not None}
        dim = next(iter(slices.values())).part
        assert dim is not None
        return torch.cat([slices[start].file.load(slices[start].key, None, None, "cpu") for start in sorted(slices)], dim[0])


    def check_written(self) -> None:
        """Raises InternalError naming a trained weight that was asked for at none of its places: it would be lost."""
        for places in self._unwritten.values():
            raise InternalError(f"{min(place.name for place in places)} was trained, and no weights file holds it")


def write_files(rewriting: Rewriting, trained: Trained, files: Path) -> dict[str, str]:
    """Writes all files of the new directory that differ under `files`; returns their paths there with their SHA-256.

    Raises FailedPrecondition where the disk is full.
    """
    hashes: dict[str, str] = {}
    try:
        for file in rewriting.files:
            target = files / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.suffix == ".safetensors":
                _write_safetensors(file, trained, target)
            else:
                _write_state_dict(file, trained, target)
            hashes[file.path] = sha256_of(target)
        trained.check_written()
        for path, text in rewriting.added.items():
            (files / path).parent.mkdir(parents=True, exist_ok=True)
            (files / path).write_text(text, encoding="utf-8")
            hashes[path] = sha256_of(files / path)
    except (OSError, RuntimeError) as error:
        raise no_room(error, files) from error
    return hashes


def no_room(error: Exception, folder: Path) -> Exception:
    """What a failure to write means: FailedPrecondition where it was for want of space (libraries say so in words), else the error."""
    is_full = getattr(error, "errno", None) in _NO_SPACE or any(os.strerror(number) in str(error) for number in _NO_SPACE)
    # torch's writer knows no errno.
    is_full = is_full or "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)
    if is_full:
        return FailedPrecondition(f"no space left to write the adapted model under {folder}; make room, or set adapted_dir elsewhere",
                                  field="adapted_dir")
    return error


def _write_safetensors(file: WeightsFile, trained: Trained, target: Path) -> None:
    source = file.open()
    shapes = {name: _described(source, name, file) for name in sorted(source.names())}
    # As the library does: larger elements first, so that each tensor is aligned for its own.
    names = sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))
    room = sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names) + _ENTRY_BYTES
    room += -room % 8
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    with target.open("wb") as out:
        out.write(struct.pack("<Q", room) + b" " * room)
        offset = 0
        for name in names:
            dtype, shape = shapes[name]
            tensor = _wanted(source, trained, Stored(file.path, name), dtype, shape)
            out.write(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + tensor.nbytes]}
            offset += tensor.nbytes
        out.seek(8)
        out.write(json.dumps(header, separators=(",", ":")).encode().ljust(room))
        _settle(out)


def _described(source: WeightsSource, name: str, file: WeightsFile) -> tuple[torch.dtype, tuple[int, ...]]:
    """Element type and shape of what is to be written."""
    if file.dtype is not None:
        return file.dtype, source.shape(name)
    stored = source.load(name, None, None, "cpu")
    if stored.dtype not in _DTYPES:
        raise FailedPrecondition(f"{file.path}: {name} is {stored.dtype}, which cannot be written as safetensors", field="files")
    return stored.dtype, tuple(stored.shape)


def _wanted(source: WeightsSource, trained: Trained, place: Stored, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = trained.whole(place)
    if tensor is None:
        tensor = source.load(place.name, None, None, "cpu")
    if tuple(tensor.shape) != shape:
        raise InternalError(f"{place.name} came back from training with shape {list(tensor.shape)} instead of {list(shape)}")
    return tensor.to(dtype).contiguous()


def _write_state_dict(file: WeightsFile, trained: Trained, target: Path) -> None:
    """A torch file, for a model.py that names one: put together in memory, read again without unpickling."""
    source = file.open()
    state: dict[str, torch.Tensor] = {}
    for name in source.names():
        dtype, shape = _described(source, name, file)
        state[name] = _wanted(source, trained, Stored(file.path, name), dtype, shape)
    with target.open("wb") as out:
        torch.save(state, out)
        _settle(out)


def _settle(out: IO[bytes]) -> None:
    out.flush()
    os.fsync(out.fileno())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

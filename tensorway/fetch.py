"""Fetching the files that a model.yaml declares: streamed, hashed on the way, and only ever visible when whole and right.

A file that is there with the declared SHA-256 is left alone, so fetching again costs one reading. Sources:

    pypi://PROJECT==VERSION/PATH/IN/WHEEL   a member of a wheel; the wheel is downloaded once, by pip, into the user's cache
    PATH                                    relative to the model directory
    SCHEME://...                            any URL that fsspec opens
"""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from tensorway.errors import FailedPrecondition, TensorwayError, Unavailable
from tensorway.model_directory import FileYaml, ModelDirectory

_PYPI: Final = "pypi://"
_BLOCK_BYTES: Final = 1 << 20
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """How far one file is."""

    path: str
    num_bytes: int
    #: 0 where the source does not tell.
    total_bytes: int
    #: `download` (a wheel; its bytes are not counted), `copy`, `present` (was there already) or `done`.
    state: str


OnProgress = Callable[[FetchProgress], None]


def fetch_files(directory: ModelDirectory, on_progress: OnProgress) -> None:
    """Fetches every declared file that is missing or wrong, in order. Blocks.

    Raises:
        Unavailable: a source cannot be reached or does not have the file.
        FailedPrecondition: a source is malformed, what came is not what was declared, or the disk is full. No half file is left.
    """
    for file in directory.yaml.files:
        target = directory.file(file.path)
        if target.is_file() and _sha256(target) == file.sha256:
            size = target.stat().st_size
            on_progress(FetchProgress(file.path, size, size, "present"))
            continue
        _fetch(directory, file, target, on_progress)


def verify_files(directory: ModelDirectory) -> None:
    """Raises FailedPrecondition naming every declared file that is missing or is not what was declared."""
    wrong: list[str] = []
    for file in directory.yaml.files:
        target = directory.file(file.path)
        if not target.is_file():
            wrong.append(f"{file.path} is missing")
        elif (actual := _sha256(target)) != file.sha256:
            wrong.append(f"{file.path} has SHA-256 {actual}, declared {file.sha256}")
    if wrong:
        raise FailedPrecondition(f"{directory.path}: {'; '.join(wrong)}; run `tensorway models fetch`", field="files")


def cache_dir() -> Path:
    """Where wheels are kept: `$XDG_CACHE_HOME/tensorway`, by default `~/.cache/tensorway`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tensorway"


def _fetch(directory: ModelDirectory, file: FileYaml, target: Path, on_progress: OnProgress) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _source(directory, file, on_progress) as (stream, total_bytes):
            num_bytes = _copy(stream, total_bytes, file, target, on_progress)
    except TensorwayError:
        raise
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise FailedPrecondition(f"{file.path}: no space left to write it under {target.parent}", field="files") from error
        raise Unavailable(f"{file.path}: cannot be fetched from {file.source}: {error}", field="files") from error
    except Exception as error:
        # fsspec's backends raise whatever their client libraries do.
        raise Unavailable(f"{file.path}: cannot be fetched from {file.source}: {type(error).__name__}: {error}", field="files") from error
    on_progress(FetchProgress(file.path, num_bytes, num_bytes, "done"))


def _copy(stream: IO[bytes], total_bytes: int, file: FileYaml, target: Path, on_progress: OnProgress) -> int:
    """Streams into a file beside `target`, which takes its place only once the hash is right. Returns the number of bytes."""
    digest = hashlib.sha256()
    num_bytes = 0
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    part = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as out:
            while block := stream.read(_BLOCK_BYTES):
                out.write(block)
                digest.update(block)
                num_bytes += len(block)
                on_progress(FetchProgress(file.path, num_bytes, total_bytes, "copy"))
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != file.sha256:
            raise FailedPrecondition(
                f"{file.path}: {file.source} has SHA-256 {digest.hexdigest()}, declared {file.sha256}", field="files"
            )
        part.chmod(0o644)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return num_bytes


@contextmanager
def _source(directory: ModelDirectory, file: FileYaml, on_progress: OnProgress) -> Iterator[tuple[IO[bytes], int]]:
    """Opens a source; yields it with its size, 0 where unknown."""
    if file.source.startswith(_PYPI):
        on_progress(FetchProgress(file.path, 0, 0, "download"))
        requirement, member = _parse_pypi(file)
        with zipfile.ZipFile(_wheel(requirement)) as wheel:
            try:
                entry = wheel.getinfo(member)
            except KeyError:
                raise Unavailable(f"{file.path}: the wheel of {requirement} has no file {member}", field="files") from None
            with wheel.open(entry) as stream:
                yield stream, entry.file_size
    elif "://" in file.source:
        import fsspec

        with fsspec.open(file.source, "rb") as opened:
            yield opened, int(getattr(opened, "size", 0) or 0)
    else:
        path = directory.path / file.source
        with path.open("rb") as local:
            yield local, path.stat().st_size


def _parse_pypi(file: FileYaml) -> tuple[str, str]:
    requirement, _, member = file.source.removeprefix(_PYPI).partition("/")
    project, _, version = requirement.partition("==")
    if not (project and version and member):
        raise FailedPrecondition(f"{file.path}: {file.source} must read {_PYPI}PROJECT==VERSION/PATH/IN/WHEEL", field="files")
    return requirement, member


def _wheel(requirement: str) -> Path:
    """The wheel of `PROJECT==VERSION`, from the cache or through pip. Several files of one wheel cost one download."""
    folder = cache_dir() / "wheels" / requirement
    found = sorted(folder.glob("*.whl"))
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    # pip writes into a folder of its own, so that a download that is cut short is never taken for a wheel.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", temporary]
        command = [sys.executable, "-m", "pip", "download", *options, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise _pip_error(requirement, done.stderr)
        (wheel,) = Path(temporary).glob("*.whl")
        return wheel.replace(folder / wheel.name)


def _pip_error(requirement: str, stderr: str) -> TensorwayError:
    lines = [line.removeprefix("ERROR: ") for line in stderr.strip().splitlines() if line.startswith("ERROR")]
    reason = lines[0] if lines else "pip failed"
    if os.strerror(errno.ENOSPC) in stderr:
        return FailedPrecondition(f"{requirement}: no space left to download it into {cache_dir()}", field="files")
    return Unavailable(f"{requirement}: cannot be downloaded: {reason}", field="files")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

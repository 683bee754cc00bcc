"""The model directory that comes out of an adaptation: built in a folder that nobody looks at, and put in its place in one move.

    ADAPTED_DIR/.adapting-XXXX/         the job's folder, locked by the node that works on it
        request, rank-N.*               for the ranks and by them
        model/                          the new directory: author's files, model.yaml, files/
    ADAPTED_DIR/NAME-REVISION           where it goes
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import yaml

from tensorway.errors import FailedPrecondition
from tensorway.model_directory import FILES_DIR, MODEL_FILE, ModelDirectory, load_directory
from tensorway_worker.adaptation_news import MODEL_FOLDER, Outcome
from tensorway_worker.adaptation_wire import AdaptOrder

_PREFIX: Final = ".adapting-"
_LOCK: Final = "lock"
#: Says, beside model.yaml, where a model comes from.
PROVENANCE_FILE: Final = "adaptation.json"
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REVISION_DIGITS: Final = 12


@contextmanager
def job_folder(adapted_dir: Path) -> Iterator[Path]:
    """A folder of mode 0700 for one job; gone at the end with all that is in it. Folders that a killed node has left go, too.

    Raises FailedPrecondition where it cannot be made.
    """
    try:
        adapted_dir.mkdir(parents=True, exist_ok=True)
        _sweep(adapted_dir)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=adapted_dir))
    except OSError as error:
        raise FailedPrecondition(f"adapted_dir: {adapted_dir} cannot be written: {error.strerror}", field="adapted_dir") from error
    try:
        with (folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(adapted_dir: Path) -> None:
    for left in adapted_dir.glob(f"{_PREFIX}*"):
        try:
            with (left / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # another node works there, or is about to
        shutil.rmtree(left, ignore_errors=True)


def finished(folder: Path, adapted_dir: Path, base: ModelDirectory, order: AdaptOrder, outcome: Outcome) -> ModelDirectory:
    """Completes the directory that the ranks have begun in `folder`, and moves it to where it stays. Blocks.

    Raises FailedPrecondition where the disk is full. An equal directory that is there already is left as it is.
    """
    made = folder / MODEL_FOLDER
    try:
        _copy_authors_files(base.path, made)
        _copy_files(base.path / FILES_DIR, made / FILES_DIR, {*outcome.files, *outcome.dropped})
        (made / MODEL_FILE).write_text(_document(base, made, order, outcome), encoding="utf-8")
        (made / PROVENANCE_FILE).write_text(json.dumps(_provenance(base, order, outcome), indent=2) + "\n", encoding="utf-8")
        revision = load_directory(made).spec.revision
        target = adapted_dir / f"{order.new_model}-{revision[:_REVISION_DIGITS]}"
        if not target.exists():
            made.rename(target)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise FailedPrecondition(
                f"no space left to write the adapted model under {adapted_dir}; make room, or set adapted_dir elsewhere",
                field="adapted_dir",
            ) from error
        raise
    return load_directory(target)


def _copy_authors_files(source: Path, target: Path) -> None:
    """What the revision is made of: everything but files/, caches and hidden files."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        is_skipped = relative.parts[0] == FILES_DIR or "__pycache__" in relative.parts or relative.name.startswith(".")
        if not is_skipped and path.is_file():
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target / relative)


def _copy_files(source: Path, target: Path, but: set[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")) if source.is_dir() else ():
        relative = path.relative_to(source)
        if path.is_file() and relative.as_posix() not in but and "__pycache__" not in relative.parts:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target / relative)


def _document(base: ModelDirectory, made: Path, order: AdaptOrder, outcome: Outcome) -> str:
    """model.yaml of the new directory."""
    document: dict[str, Any] = yaml.safe_load((base.path / MODEL_FILE).read_text(encoding="utf-8"))
    kept = [
        {"path": file.path, "source": _source(made, file.path, file.source), "sha256": file.sha256}
        for file in base.yaml.files if file.path not in {*outcome.files, *outcome.dropped}
    ]
    new = [{"path": path, "source": f"{FILES_DIR}/{path}", "sha256": sha256} for path, sha256 in sorted(outcome.files.items())]
    document["name"] = order.new_model
    document["files"] = [*kept, *new]
    if outcome.settings:
        document["settings"] = {**document.get("settings", {}), **outcome.settings}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=140)


def _source(made: Path, path: str, source: str) -> str:
    """A source that holds in the new directory, too: one that lay outside of the old one is the copy under files/."""
    return source if "://" in source or (made / source).is_file() else f"{FILES_DIR}/{path}"


def _provenance(base: ModelDirectory, order: AdaptOrder, outcome: Outcome) -> dict[str, Any]:
    said = {name: value for name, value in asdict(order).items() if name not in ("inputs", "targets", "model", "revision", "new_model")}
    first, last = outcome.losses
    return {
        "model": base.yaml.name, "revision": base.spec.revision, **said, "num_rows": order.num_rows,
        "num_parameters": outcome.num_parameters, "first_loss": first, "last_loss": last,
    }


def adapted_dir_of(setting: str, models_dir: str) -> Path:
    """Where adapted models go: the setting, or `adapted` beside models_dir."""
    return Path(setting).absolute() if setting else Path(models_dir).absolute().parent / "adapted"


def write_request(folder: Path, message: bytes, name: str) -> None:
    """The request for the leader. Raises FailedPrecondition where the disk is full."""
    try:
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            out.write(message)
    except OSError as error:
        raise FailedPrecondition(f"the examples cannot be kept in {folder.parent}: {error.strerror}", field="adapted_dir") from error

"""The repository as the house checks see it: which files there are, and the parsed sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[3]
#: Sources of the three services and their kit.
PRODUCT = ("tensorway", "services")
#: Everything else that is written by hand and runs, except the tests.
BESIDE = ("docs", "examples", "benchmarks", "models")
#: Stubs made by protoc.
GENERATED = ("tensorway/v1/", "tensorway/compat/")
_SKIPPED = {"__pycache__", "files", "build", "dist", "node_modules", "wheels", "certs"}


@dataclass(frozen=True, slots=True)
class Source:
    """One Python file."""

    #: Relative to the repository, with slashes.
    path: str
    text: str
    tree: ast.Module


def repository_files() -> Iterator[Path]:
    """Every file that a person wrote or committed: no caches, environments or fetched files."""
    folders = [ROOT]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            name = path.name
            if path.is_dir():
                if name not in _SKIPPED and not name.endswith(".egg-info") and (not name.startswith(".") or name == ".ci"):
                    folders.append(path)
            elif not path.is_symlink():
                yield path


def relative(path: Path) -> str:
    """`path` as messages name it."""
    return path.relative_to(ROOT).as_posix()


def parse(path: str, text: str) -> Source:
    """A source that need not be on disk."""
    return Source(path, text, ast.parse(text))


@cache
def sources(*folders: str) -> tuple[Source, ...]:
    """All Python sources under `folders`, generated stubs left out."""
    found = (path for path in repository_files() if path.suffix == ".py" and relative(path).startswith(tuple(f"{f}/" for f in folders)))
    return tuple(parse(relative(path), path.read_text(encoding="utf-8")) for path in found if not relative(path).startswith(GENERATED))


@cache
def pages() -> tuple[Path, ...]:
    """Every Markdown page of the repository."""
    return tuple(path for path in repository_files() if path.suffix == ".md")

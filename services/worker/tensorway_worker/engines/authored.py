"""Importing what an author put beside model.yaml."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Final

from tensorway.errors import FailedPrecondition

MODEL_PY: Final = "model.py"


def import_file(path: Path, name: str) -> ModuleType:
    """Imports the Python file `path` as module `name`. What its code raises passes through.

    The module is put into `sys.modules` first, so that dataclasses, pickling and relative imports inside it work.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FailedPrecondition(f"{path} is no Python file", field=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def import_model_py(directory: Path) -> ModuleType | None:
    """The author's `model.py`, or None where there is none."""
    path = directory / MODEL_PY
    if not path.is_file():
        return None
    return import_file(path, f"tensorway_model_{directory.name.replace('-', '_').replace('.', '_')}")

"""Engines: each runs one kind of model behind `tensorway_worker.engines.port.Engine`."""

from __future__ import annotations

from tensorway.model_directory import ModelDirectory
from tensorway_worker.engines.port import Cut, Engine

__all__ = ["open_engine"]


def open_engine(directory: ModelDirectory, device: str, cut: Cut | None = None) -> Engine:
    """The engine that model.yaml asks for, not loaded yet. Each engine's libraries are imported only when it is chosen.

    Args:
        cut: the part of the model that this rank holds; None for the whole.

    Raises FailedPrecondition where model.yaml's settings do not fit the engine, or the model cannot be cut like this.
    """
    engine = directory.yaml.engine
    if engine == "torchscript":
        from tensorway_worker.engines.torchscript import torchscript_engine

        return torchscript_engine(directory, device)
    if engine == "export":
        from tensorway_worker.engines.export import export_engine

        return export_engine(directory, device)
    if engine == "transformers":
        from tensorway_worker.engines.transformers import transformers_engine

        return transformers_engine(directory, device)
    from tensorway_worker.engines.python import PythonEngine

    return PythonEngine(directory, device)

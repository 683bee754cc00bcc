"""Engines: each runs one kind of model behind `tensorway_worker.engines.port.Engine`."""

from __future__ import annotations

from typing import Final

from tensorway.errors import FailedPrecondition
from tensorway.model_directory import ModelDirectory
from tensorway_worker.engines.port import Cut, Engine

__all__ = ["open_engine"]

#: Engines whose models cannot be cut, and why.
_UNCUTTABLE: Final = {
    "torchscript": "a TorchScript module runs as one compiled program, whose layers cannot be left out",
    "export": "an exported program is one graph with all of its weights, whose layers cannot be left out",
}


def open_engine(directory: ModelDirectory, device: str, cut: Cut | None = None) -> Engine:
    """The engine that model.yaml asks for, not loaded yet. Each engine's libraries are imported only when it is chosen.

    Args:
        cut: the part of the model that this rank holds; None for the whole.

    Raises FailedPrecondition where model.yaml's settings do not fit the engine, or the model cannot be cut like this.
    """
    engine = directory.yaml.engine
    # A part that is the whole is run like one.
    cut = cut if cut is not None and cut.place.is_cut else None
    if cut is not None and engine in _UNCUTTABLE:
        raise FailedPrecondition(
            f"{directory.yaml.name}: parallel must be 1 x 1 for engine {engine}: {_UNCUTTABLE[engine]}; use replicas, or engine python "
            "with the network's own code",
            field="parallel",
        )
    if engine == "torchscript":
        from tensorway_worker.engines.torchscript import torchscript_engine

        return torchscript_engine(directory, device)
    if engine == "export":
        from tensorway_worker.engines.export import export_engine

        return export_engine(directory, device)
    if engine == "transformers" and directory.yaml.settings.get("placement"):
        if cut is not None:
            raise FailedPrecondition(
                f"{directory.yaml.name}: settings.placement has one rank place the whole model; use parallel.custom, or leave it out",
                field="settings.placement",
            )
        from tensorway_worker.engines.placed import placed_engine

        return placed_engine(directory, device)
    if directory.yaml.generation is not None:
        from tensorway_worker.engines.generation.engine import generation_engine

        return generation_engine(directory, device, cut)
    if engine == "transformers":
        from tensorway_worker.engines.transformers import transformers_engine

        return transformers_engine(directory, device, cut)
    from tensorway_worker.engines.python import PythonEngine

    return PythonEngine(directory, device, cut)

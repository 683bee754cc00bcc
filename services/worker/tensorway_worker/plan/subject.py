"""The model that is planned for, without memory for its weights."""

from __future__ import annotations

import torch

from tensorway.errors import FailedPrecondition
from tensorway.model_directory import ModelDirectory
from tensorway_worker.engines.cut.assembly import Uncut
from tensorway_worker.engines.port import Collective, Cut
from tensorway_worker.topology import Place


def subject_of(directory: ModelDirectory, device: str, rows: int) -> tuple[Uncut, tuple[str, ...]]:
    """The model ready to be cut, and what is worth saying about it. Raises FailedPrecondition where its engine cannot be cut."""
    for declared in directory.missing_files():
        raise FailedPrecondition(f"{declared.path} is not there; run `tensorway models fetch` first", field="files")
    engine = directory.yaml.engine
    with torch.inference_mode(False), torch.no_grad():
        if engine == "transformers":
            from tensorway_worker.engines import open_engine
            from tensorway_worker.engines.transformers import TransformersEngine

            opened = open_engine(directory, device)
            # One that places itself on several devices has nothing to be cut, but says why.
            transformers_engine = opened if isinstance(opened, TransformersEngine) else TransformersEngine(directory, device)
            return transformers_engine.uncut(rows), transformers_engine.notes
        if engine == "python":
            from tensorway_worker.engines.python import PythonEngine

            return PythonEngine(directory, device).uncut(rows), ()
        from tensorway_worker.engines import open_engine

        # Says why not.
        open_engine(directory, device, Cut(Place(0, 2), _nobody(), lambda _, decide: decide()))
    raise FailedPrecondition(f"{directory.yaml.name}: engine {engine} cannot be cut", field="engine")


def _nobody() -> Collective:
    from tensorway_worker.plan.prediction import NoOthers

    return NoOthers(0, 1)

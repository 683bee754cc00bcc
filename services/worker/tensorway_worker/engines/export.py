"""Engine `export`: a program saved by `torch.export.save` (.pt2)."""

from __future__ import annotations

from pathlib import Path

import torch

from tensorway.model_directory import ModelDirectory
from tensorway_worker.engines.module import ModuleEngine


def export_engine(directory: ModelDirectory, device: str) -> ModuleEngine:
    """An engine for `settings.file`, an exported program. Mark dimension 0 as dynamic when exporting, or it takes one size of batch."""
    return ModuleEngine(directory, device, _load)


def _load(path: Path, device: str) -> torch.nn.Module:
    program = torch.export.load(str(path))
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return program.module()

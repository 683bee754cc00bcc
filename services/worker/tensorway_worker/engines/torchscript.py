"""Engine `torchscript`: a module saved by `torch.jit.save`."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from tensorway.model_directory import ModelDirectory
from tensorway_worker.engines.module import ModuleEngine


def torchscript_engine(directory: ModelDirectory, device: str) -> ModuleEngine:
    """An engine for `settings.file`, a TorchScript archive. Loading one runs TorchScript, never a pickle's own code."""
    return ModuleEngine(directory, device, _load)


def _load(path: Path, device: str) -> torch.nn.Module:
    with warnings.catch_warnings():
        # TorchScript is deprecated for new models; this engine exists for those that are already saved.
        warnings.simplefilter("ignore", DeprecationWarning)
        module: torch.nn.Module = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
    return module.eval()

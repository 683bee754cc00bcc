"""Reading weights without running whatever a pickle says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from tensorway.errors import FailedPrecondition

#: `weights_dtype` of model.yaml -> torch dtype; `keep` has none.
DTYPES: Final[dict[str, torch.dtype]] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_weights(path: Path, device: str, weights_dtype: str, unpickle: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file or a torch state dict, by name.

    Args:
        path: the file; `.safetensors` is read as such, anything else by `torch.load`.
        device: where the tensors go.
        weights_dtype: `keep`, or what floating-point tensors are turned into.
        unpickle: file names that may be unpickled in full; every other torch file may hold tensors only.

    Raises:
        FailedPrecondition: the file needs unpickling that is not allowed, or is no state dict.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path, device=device)
    else:
        tensors = _load_torch(path, device, path.name in unpickle)
    dtype = DTYPES.get(weights_dtype)
    if dtype is None:
        return tensors
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _load_torch(path: Path, device: str, may_unpickle: bool) -> dict[str, torch.Tensor]:
    import pickle

    try:
        loaded = torch.load(path, map_location=device, weights_only=not may_unpickle)
    except pickle.UnpicklingError as error:
        raise FailedPrecondition(
            f"{path.name} holds more than tensors; list it under settings.unpickle if you trust whoever made it, or convert it to "
            f"safetensors ({str(error).splitlines()[0]})",
            field="settings.unpickle",
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise FailedPrecondition(f"{path.name} is no state dict (name -> tensor), but a {type(loaded).__name__}", field="files")
    return dict(loaded)


def module_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))

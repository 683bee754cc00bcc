"""Tensors as they go from rank to rank."""

from __future__ import annotations

import torch

from tensorway.errors import ModelFailed
from tensorway.model import Value


def sendable(name: str, value: Value) -> torch.Tensor:
    """`value` itself. Raises ModelFailed, naming it, where it is no tensor."""
    if not isinstance(value, torch.Tensor):
        raise ModelFailed(f"{name} is BYTES, which cannot be sent to other ranks; turn it into tensors in preprocess")
    return value


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements in a storage of their own: RPC sends the whole storage of a view, as long as that is less than twice the view."""
    if tensor.untyped_storage().nbytes() > tensor.nbytes:
        return tensor.contiguous() if not tensor.is_contiguous() else tensor.clone()
    return tensor

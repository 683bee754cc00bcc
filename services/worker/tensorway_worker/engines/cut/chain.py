"""An author's `stages()`: consecutive modules, of which a rank runs a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from tensorway.errors import ModelFailed
from tensorway.model import Inputs, Outputs

#: Names in the carry of a single tensor, and of the elements of a tuple (`~0`, `~1`, …).
_TENSOR: Final = "~tensor"
_ELEMENT: Final = "~"


class ChainStage:
    """Modules [begin, end) of a chain, from carry to carry; see `tensorway.model.Model.stages`."""

    def __init__(self, modules: Sequence[torch.nn.Module], begin: int, end: int) -> None:
        self._modules = tuple(modules[begin:end])
        self._is_first = begin == 0
        self._is_last = end == len(modules)
        self._begin = begin

    def __call__(self, carry: Inputs) -> Outputs:
        value: Any = dict(carry) if self._is_first else _value(carry)
        for module in self._modules:
            value = module(value)
        if self._is_last:
            if not isinstance(value, Mapping):
                raise ModelFailed(f"the last of stages() must return the outputs by name, not a {type(value).__name__}")
            return dict(value)
        return _carry(value, self._begin + len(self._modules) - 1)


def _carry(value: Any, stage: int) -> Outputs:
    if isinstance(value, torch.Tensor):
        return {_TENSOR: value}
    named = dict(value) if isinstance(value, Mapping) else None
    if isinstance(value, tuple):
        named = {f"{_ELEMENT}{place}": one for place, one in enumerate(value)}
    if named is None or not all(isinstance(one, torch.Tensor) for one in named.values()):
        kind = type(value).__name__
        raise ModelFailed(f"stages()[{stage}] must return a tensor, a tuple of tensors or a dictionary of tensors, not a {kind}")
    return named


def _value(carry: Inputs) -> Any:
    if _TENSOR in carry:
        return carry[_TENSOR]
    if f"{_ELEMENT}0" in carry:
        return tuple(carry[f"{_ELEMENT}{place}"] for place in range(len(carry)))
    return dict(carry)

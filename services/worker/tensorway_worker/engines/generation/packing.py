"""Weights of linear layers in the order in which oneDNN reads them.

torch hands oneDNN a weight as it lies, and a step of few tokens spends more on walking through it than on the products. So it is laid out
once, at load. Only for layers on the CPU, of the types that oneDNN has kernels for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

#: Tokens of a step that the layout is chosen for. One for a single token is many times slower with a few.
_ROWS: Final = 16
_DTYPES: Final = (torch.float32, torch.bfloat16)


def pack(model: torch.nn.Module) -> int:
    """Packs the linear layers of a loaded model, for good; returns the bytes of the weights that are nowhere else now. Layers that are no
    plain `torch.nn.Linear`, and those that share their weight with another module, keep it; the latter have a packed copy beside it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    shared = _shared_weights(model)
    num_bytes = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and _can_be_packed(module):
            weight = module.weight.data
            vars(module)["forward"] = _packed_forward(weight, module.bias)
            if id(module.weight) not in shared:
                num_bytes += weight.nbytes
                module.weight.data = weight.new_empty(0)
    return num_bytes


def _can_be_packed(module: torch.nn.Linear) -> bool:
    # One with a forward of its own, or of a class of its own, is somebody else's.
    if type(module) is not torch.nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    return weight.device.type == "cpu" and weight.dtype in _DTYPES and weight.numel() > 0


def _shared_weights(model: torch.nn.Module) -> set[int]:
    """Identities of the parameters that several modules hold (an output layer often is the embedding)."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _packed_forward(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    # What torch's own compiler does with a model that is only run (torch/_inductor/fx_passes/mkldnn_fusion.py).
    operations: Any = torch.ops.mkldnn
    packed, multiply = operations._reorder_linear_weight(weight, _ROWS), operations._linear_pointwise

    def forward(given: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = multiply(given, packed, bias, "none", [], "")
        return product

    return forward

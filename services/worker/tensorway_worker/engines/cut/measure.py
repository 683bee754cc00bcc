"""How long each unit of a model takes on the device at hand.

Units of one kind (same class, same shapes) are measured once: materialised alone with made-up weights, run, and freed. So a rank never
holds more than one unit for it, however large the model is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.utils._pytree import tree_leaves, tree_map

from tensorway_worker.engines.cut.trace import Call
from tensorway_worker.engines.cut.trunk import Trunk

_MAX_RUNS: Final = 5
_ENOUGH_S: Final = 0.15
#: More than a core's share of the caches of today's processors.
_CACHE_BYTES: Final = 64 << 20
#: Neither zero (pages of zeros share one page of memory) nor so large that activations overflow.
_WEIGHT: Final = 0.01


def measured_s(trunk: Trunk, root: torch.nn.Module, device: str) -> list[float]:
    """Seconds that each unit of `trunk` takes on `device` at the sizes of its trace; glue between modules is not counted.

    `root`: the modules, on the meta device; left as they were.
    """
    modules = dict(root.named_modules())
    kinds: dict[object, float] = {}
    times: list[float] = []
    for unit in trunk.units:
        total = 0.0
        for call in unit.calls:
            kind = _kind(modules[call.name], call)
            if kind not in kinds:
                kinds[kind] = _timed(modules[call.name], call, device)
            total += kinds[kind]
        times.append(total)
    return times


def _kind(module: torch.nn.Module, call: Call) -> object:
    weights = tuple((name, tuple(one.shape), one.dtype) for name, one in (*module.named_parameters(), *module.named_buffers()))
    leaves = tree_leaves((call.args, dict(call.kwargs)))
    # What a module without weights is set to (a stride, a size) shows in its representation.
    text = repr(module)
    return type(module), text, weights, tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves if isinstance(leaf, torch.Tensor))


def _timed(module: torch.nn.Module, call: Call, device: str) -> float:
    with torch.inference_mode(False), torch.no_grad(), _materialised(module, device):
        args, kwargs = tree_map(lambda leaf: _argument(leaf, device), (call.args, dict(call.kwargs)))
        module(*args, **kwargs)
        other = torch.zeros(_CACHE_BYTES if device == "cpu" else 0, dtype=torch.uint8)
        took: list[float] = []
        while len(took) < _MAX_RUNS and sum(took) < _ENOUGH_S:
            # In a whole model, other layers' weights have pushed this one's out of the processor's caches.
            other.add_(1)
            _wait(device)
            began = time.perf_counter()
            module(*args, **kwargs)
            _wait(device)
            took.append(time.perf_counter() - began)
        return statistics.median(took)


@contextmanager
def _materialised(module: torch.nn.Module, device: str) -> Iterator[None]:
    """Gives a module's parameters content for a while."""
    held: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, torch.Tensor] = {}
    try:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    held.append((part._parameters, name, parameter))
                    if id(parameter) not in made:
                        full = torch.full(parameter.shape, _WEIGHT, dtype=parameter.dtype, device=device)
                        made[id(parameter)] = torch.nn.Parameter(full, requires_grad=False)
                    part._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    held.append((part._buffers, name, buffer))
                    part._buffers[name] = torch.ones_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
        yield
    finally:
        for where, name, before in held:
            where[name] = before


def _argument(leaf: Any, device: str) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if not leaf.is_meta:
        return leaf.to(device)
    if leaf.is_floating_point():
        return torch.randn(leaf.shape, device=device).to(leaf.dtype)
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=device)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)

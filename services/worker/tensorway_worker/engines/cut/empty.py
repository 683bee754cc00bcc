"""Building modules without memory for their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

_MOVES: Final = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu}


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules that are built here have their parameters on the meta device, and stay there though they be moved; buffers are real.

    Buffers are computed by the modules' own code and often in no file (rotary frequencies, position numbers), and small. Like
    `accelerate.init_empty_weights(include_buffers=False)`, but a parameter that stands at several places (tied weights) stays one.
    A module's code still asks for the memory of each parameter for a moment, but nothing writes there, so it never becomes real.
    Changes torch.nn.Module for the whole process while it lasts: for the torch thread, while a model is loaded.
    """
    register = torch.nn.Module.register_parameter
    emptied = WeakIdKeyDictionary()

    def register_empty(self: torch.nn.Module, name: str, param: Any) -> None:
        if param is not None and not param.is_meta:
            if param not in emptied:
                emptied[param] = torch.nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            param = emptied[param]
        register(self, name, param)

    torch.nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        with _Unmoved():
            yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


class _Unmoved(TorchFunctionMode):
    """`module.to(device)` has nothing to move of a parameter without memory; a change of dtype is made."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MOVES and args[0].is_meta:
            dtype = next((one for one in (*args[1:], *kwargs.values()) if isinstance(one, torch.dtype)), None)
            return args[0] if dtype is None else func(args[0], dtype)
        return func(*args, **kwargs)

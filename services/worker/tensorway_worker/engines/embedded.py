"""Which embedding turns an integer input into numbers that have derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from tensorway.model import Inputs, Outputs


def embedding_of(
    modules: Iterable[torch.nn.Module], run: Callable[[Inputs], Outputs], example: Inputs, name: str, device: str
) -> torch.nn.Module | None:
    """The first torch.nn.Embedding that gets the input `name` unchanged in `run(example)`; None where none does.

    Runs one step. `example` lies on the CPU.
    """
    inputs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in example.items()}
    wanted = inputs.get(name)
    if not isinstance(wanted, torch.Tensor) or wanted.is_floating_point():
        return None
    # Its own values, since the model may write into its inputs.
    content = wanted.clone()
    found: list[torch.nn.Module] = []

    def look(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        ids = args[0] if args else None
        if isinstance(ids, torch.Tensor) and ids.shape == content.shape and torch.equal(ids.to(content.dtype), content):
            found.append(module)

    embeddings = {id(part): part for module in modules for part in module.modules() if isinstance(part, torch.nn.Embedding)}
    hooks = [part.register_forward_pre_hook(look) for part in embeddings.values()]
    try:
        with torch.no_grad():
            run(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None

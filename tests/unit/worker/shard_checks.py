"""What every test of tensor shards compares: outputs and input gradients with the whole model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from shard_threads import Shards
from torch import nn

#: Sums in another order differ in the last bits; this is the tolerance that is promised.
TOLERANCE = 1e-4


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within the tolerance, measured by the largest number of what is expected."""
    return got.shape == expected.shape and bool((got - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1.0))


def batch(vocabulary: int, length: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, vocabulary, (3, length), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def first(result: Any) -> torch.Tensor:
    output: torch.Tensor = result[0]
    return output


def forward(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return first(model(**inputs))


def gradient(model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the derivative of a weighted sum of it with respect to the embedded tokens."""
    embedded: list[torch.Tensor] = []

    def lift(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    hook = model.get_input_embeddings().register_forward_hook(lift)
    output = first(model(**inputs))
    hook.remove()
    weights = torch.linspace(-1, 1, output.shape[-1])
    (found,) = torch.autograd.grad((output * weights).sum(), embedded)
    return output.detach(), found


def same_as_whole(shards: Shards, whole: Any, inputs: Mapping[str, torch.Tensor]) -> None:
    expected = forward(whole, inputs)
    got = shards.run(lambda model: forward(model, inputs))
    assert all(close(one, expected) for one in got)
    # All shards hold the very same bits: what is not summed must not drift apart.
    assert all(torch.equal(one, got[0]) for one in got)
    output, derivative = gradient(whole, inputs)
    for one, its in shards.run(lambda model: gradient(model, inputs)):
        assert close(one, output) and close(its, derivative)


def num_elements(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

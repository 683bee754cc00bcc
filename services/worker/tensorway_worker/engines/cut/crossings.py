"""Where tensors cross between what every shard holds whole and what each holds a slice of: sums, joins and slices with derivatives.

After Megatron-LM's conjugate operators f and g (Shoeybi et al., 2019, section 3). A value outside of the cut layers, and its gradient, is
equal on every shard: so where a whole tensor enters, gradients are summed, and where sums leave, gradients pass as they are.
"""

from __future__ import annotations

from typing import Any

import torch

from tensorway_worker.engines.port import Collective


class _CopyIn(torch.autograd.Function):
    """Into a block: the tensor as it is; backwards, the sum of what the shards' slices say about it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, collective: Collective) -> torch.Tensor:
        ctx.collective = collective
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        # Summed in place, hence a copy: the gradient may be someone else's too.
        return ctx.collective.sum_(gradients[0].clone(memory_format=torch.contiguous_format)), None


class _SumOut(torch.autograd.Function):
    """Out of a block: the sum over the shards; backwards, the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, collective: Collective) -> torch.Tensor:
        return collective.sum_(tensor.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class _JoinOut(torch.autograd.Function):
    """Out of a layer: the shards' slices of the last dimension joined; backwards, this shard's slice of the gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, collective: Collective) -> torch.Tensor:
        ctx.shard, ctx.width = collective.shard, tensor.shape[-1]
        return collective.gather(tensor.contiguous(), tensor.dim() - 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].narrow(-1, ctx.shard * ctx.width, ctx.width), None


class _SplitIn(torch.autograd.Function):
    """Into a rowwise layer that takes a whole input: this shard's slice of the last dimension; backwards, the slices joined."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, collective: Collective) -> torch.Tensor:
        ctx.collective = collective
        return own_slice(tensor, collective)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.collective.gather(gradients[0].contiguous(), gradients[0].dim() - 1), None


def _applied(function: type[torch.autograd.Function], tensor: torch.Tensor, collective: Collective) -> torch.Tensor:
    result: torch.Tensor = function.apply(tensor, collective)  # type: ignore[no-untyped-call]
    return result


# Without gradients none of these is entered: a Function costs some 10 us, and its forward a copy. Meta tensors, which a trace runs the
# model on, have no values to sum.


def copied_in(tensor: torch.Tensor, collective: Collective) -> torch.Tensor:
    """Where a whole tensor enters what is cut. Same shape."""
    if tensor.requires_grad and torch.is_grad_enabled() and not tensor.is_meta:
        return _applied(_CopyIn, tensor, collective)
    return tensor


def summed(tensor: torch.Tensor, collective: Collective) -> torch.Tensor:
    """The sum of the shards' results, in place where no gradients are wanted. Same shape."""
    if tensor.is_meta:
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        return _applied(_SumOut, tensor, collective)
    return collective.sum_(tensor if tensor.is_contiguous() else tensor.contiguous())


def joined(tensor: torch.Tensor, collective: Collective) -> torch.Tensor:
    """The shards' slices of the last dimension as one tensor."""
    if tensor.is_meta:
        return torch.cat([tensor] * collective.num_shards, -1)
    if tensor.requires_grad and torch.is_grad_enabled():
        return _applied(_JoinOut, tensor, collective)
    return collective.gather(tensor.contiguous(), tensor.dim() - 1)


def own_slice(tensor: torch.Tensor, collective: Collective) -> torch.Tensor:
    """This shard's slice of the last dimension, which must divide by the shards. Not differentiable across shards."""
    width = tensor.shape[-1] // collective.num_shards
    return tensor.narrow(-1, collective.shard * width, width)


def split_in(tensor: torch.Tensor, collective: Collective) -> torch.Tensor:
    """`own_slice`, differentiable."""
    if tensor.requires_grad and torch.is_grad_enabled() and not tensor.is_meta:
        return _applied(_SplitIn, tensor, collective)
    return own_slice(tensor, collective)


class Entrance:
    """Where a whole tensor enters a block. Query, key and value take the same one: it is copied in once, and so summed once backwards."""

    def __init__(self, collective: Collective) -> None:
        self._collective = collective
        self._taken: torch.Tensor | None = None
        self._copied: torch.Tensor | None = None

    def enter(self, tensor: torch.Tensor) -> torch.Tensor:
        """`copied_in`, once for one and the same tensor."""
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        if self._copied is None or self._taken is not tensor:
            self._taken, self._copied = tensor, copied_in(tensor, self._collective)
        return self._copied

    def leave(self) -> None:
        """Lets go of the tensors: the block is through."""
        self._taken = self._copied = None

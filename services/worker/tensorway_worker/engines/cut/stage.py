"""One stage of a cut model as a function from carry to carry (tensors by name), differentiable.

Everything is set up once: the modules that are left out get another `forward`, the last own module a hook that leaves the model's forward.
A step costs a few dictionary look-ups more than the same layers in a whole model.

The carry holds the activation, the integer inputs (every stage computes masks and positions from them again), floating-point inputs as far
as a later stage needs their content, and shapes: a shape travels as a tensor without elements, `[rows, 0, …]` for `[rows, …]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

import torch
from torch.utils._pytree import tree_leaves, tree_unflatten

from tensorway.errors import ModelFailed
from tensorway.model import Inputs, Outputs
from tensorway_worker.engines.cut.own_weights import is_askew
from tensorway_worker.engines.cut.part import Exit, Filling, Leaf, LeftOut, Noted, Part

#: Names in the carry that no input may have.
ACTIVATION: Final = "~activation"
SHAPE: Final = "~shape of "
INPUT_SHAPE: Final = "~shape and dtype of "


class _Leave(BaseException):
    """Leaves the model's forward. Not an Exception: an author's `except Exception` must not catch it."""


class _Gate:
    """A module with something to do at some of its calls. Counts the calls of one step."""

    __slots__ = ("count", "left_out")

    def __init__(self) -> None:
        self.count = 0
        self.left_out: dict[int, LeftOut] = {}


class Stage:
    """One stage. `stage(carry)` takes the inputs (first stage) or what the stage before returned.

    The last stage returns the outputs, any other a carry. Not for several threads at once.
    """

    def __init__(self, root: torch.nn.Module, call: Callable[[Inputs], Outputs], part: Part, *, poison: bool = False) -> None:
        """Changes the modules of `root` for good; they need to hold this stage's own weights only.

        Args:
            call: the whole model's step, by `root`'s modules.
            poison: fills with NaN whatever has no right content, for checks; otherwise it is left as it comes.
        """
        self._call = call
        self._part = part
        self._poison = poison
        self._received: torch.Tensor | None = None
        self._result: torch.Tensor | None = None
        self._shapes: dict[str, torch.Size] = {}
        self._modules = dict(root.named_modules())
        self._gates: dict[str, _Gate] = {}
        for left in part.left_out:
            self._gate(left.module).left_out[left.index] = left
        for noted in part.noted:
            self._note(noted)
        if part.exit is not None:
            self._leave_after(part.exit)

    def __call__(self, carry: Inputs) -> Outputs:
        for gate in self._gates.values():
            gate.count = 0
        inputs, kept = (carry, carry) if self._part.is_first else self._unpacked(carry)
        # What goes on to the next stage, and what has no memory of its own, must not be written into.
        given = {name: value.clone() if name in self._part.changed_inputs else value for name, value in _tensors(inputs).items()}
        try:
            outputs = self._call(cast("Inputs", given))
        except _Leave:
            return self._packed(kept)
        finally:
            self._received = None
        if self._part.exit is not None:
            raise ModelFailed(f"forward ended without reaching {self._part.exit.module}, which it reached when the model was loaded")
        return outputs

    def _unpacked(self, carry: Inputs) -> tuple[Inputs, Inputs]:
        """The inputs for forward, and what of the carry goes on unchanged."""
        inputs: Inputs = {}
        kept: Inputs = {}
        for name, value in _tensors(carry).items():
            if name == ACTIVATION:
                # A leaf of a backward pass must not be written into, and what lies askew in memory gives other bits.
                is_unfit = (self._part.changes_received and value.requires_grad) or is_askew(value)
                self._received = value.clone() if is_unfit else value
            elif name.startswith(SHAPE):
                self._shapes[name.removeprefix(SHAPE)] = _shape(value)
            elif name.startswith(INPUT_SHAPE):
                inputs[name.removeprefix(INPUT_SHAPE)] = self._scalar(value).expand(_shape(value))
                kept[name] = value
            else:
                inputs[name] = kept[name] = value
        return inputs, kept

    def _packed(self, kept: Inputs) -> Outputs:
        """The carry of the next stage."""
        activation, self._result = self._result, None
        if activation is None:
            raise ModelFailed("forward was left without a result")
        carry: Outputs = {ACTIVATION: activation}
        for name, value in _tensors(kept).items():
            if name.startswith(INPUT_SHAPE) or not value.is_floating_point() or name in self._part.inputs_ahead:
                carry[name] = value
            else:
                carry[INPUT_SHAPE + name] = _without_elements(value.shape, value.dtype, value.device)
        for key in self._part.shapes_ahead:
            carry[SHAPE + key] = _without_elements(self._shapes[key], torch.uint8, activation.device)
        return carry

    def _scalar(self, like: torch.Tensor) -> torch.Tensor:
        content = float("nan") if self._poison and like.is_floating_point() else 0
        return torch.full((), content, dtype=like.dtype, device=like.device)

    def _gate(self, name: str) -> _Gate:
        """The gate of a module, with its `forward` behind it."""
        found = self._gates.get(name)
        if found is not None:
            return found
        gate = self._gates[name] = _Gate()
        module = self._modules[name]
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            left = gate.left_out.get(gate.count)
            gate.count += 1
            return own(*args, **kwargs) if left is None else self._filled(left, args, kwargs)

        module.forward = forward
        return gate

    def _filled(self, left: LeftOut, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = [self._value(leaf, args, kwargs) for leaf in left.leaves]
        return values[0] if left.structure.is_leaf() else tree_unflatten(values, left.structure)

    def _value(self, leaf: Leaf, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if leaf.filling is Filling.RECEIVED:
            return self._received
        if leaf.filling is Filling.BLANK and self._received is not None:
            shape = self._shapes[leaf.shape_key] if leaf.shape_key else self._received.shape
            blank = torch.empty(shape, dtype=leaf.dtype, device=self._received.device)
            return blank.fill_(float("nan")) if self._poison and blank.is_floating_point() else blank
        return tree_leaves((args, kwargs))[leaf.argument] if leaf.argument >= 0 else leaf.constant

    def _note(self, noted: Noted) -> None:
        gate = self._gate(noted.module)

        def note(_: torch.nn.Module, __: Any, output: Any) -> None:
            if gate.count == noted.index + 1:
                self._shapes[noted.key] = tree_leaves(output)[noted.leaf].shape

        self._modules[noted.module].register_forward_hook(note)

    def _leave_after(self, leave: Exit) -> None:
        gate = self._gate(leave.module)

        def leave_forward(_: torch.nn.Module, __: Any, output: Any) -> None:
            if gate.count == leave.index + 1:
                self._result = output if isinstance(output, torch.Tensor) else tree_leaves(output)[leave.leaf]
                raise _Leave

        self._modules[leave.module].register_forward_hook(leave_forward)


def _without_elements(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor that tells `shape` by its own and has no bytes; dimension 0 stays in front."""
    return torch.empty((*shape[:1], 0, *shape[1:]), dtype=dtype, device=device)


def _shape(told: torch.Tensor) -> torch.Size:
    return torch.Size((*told.shape[:1], *told.shape[2:])) if told.dim() > 1 else torch.Size(())


def _tensors(carry: Inputs) -> dict[str, torch.Tensor]:
    """The carry as what it is: a model whose inputs are no tensors is refused before it is cut."""
    return cast("dict[str, torch.Tensor]", carry)

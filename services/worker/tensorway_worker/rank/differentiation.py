"""Derivatives on one rank: a stage run with gradients, the score of a target, and the derivative of what a stage returned.

A vector-Jacobian product needs no more of a stage than its inputs, its outputs, and the derivatives with respect to the outputs; chained
from the last stage to the first, they give the derivative through the whole model (Baydin et al., 2018: reverse accumulation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tensorway.errors import InvalidRequest
from tensorway.model import Inputs, Outputs
from tensorway_worker.engines.port import Engine
from tensorway_worker.rank.gradient_port import Gradient, Target


@dataclass(slots=True)
class Tape:
    """One stage after its forward pass: enough to go back through it, once."""

    #: What the stage returned, by name; part of the graph.
    outputs: Mapping[str, torch.Tensor]
    #: With respect to what it is differentiated, by name.
    leaves: Mapping[str, torch.Tensor]

    def back(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """d score / d leaves, given d score / d outputs (of those that matter)."""
        pairs = [(self.outputs[name], gradient) for name, gradient in gradients.items() if self.outputs[name].requires_grad]
        leaves = list(self.leaves.values())
        if not pairs:
            return {name: torch.zeros_like(leaf) for name, leaf in self.leaves.items()}
        found = torch.autograd.grad([pair[0] for pair in pairs], leaves, [pair[1] for pair in pairs], allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if one is None else one for (name, leaf), one in zip(self.leaves.items(), found, strict=True)
        }


def first_stage(engine: Engine, inputs: Inputs, name: str, at: torch.Tensor | None) -> Tape:
    """Runs the stage that takes the inputs; the one leaf is the input `name`, or the output of its embedding.

    Raises InvalidRequest where it can be neither, or `at` has another shape.
    """
    if name not in inputs:
        raise InvalidRequest(f"input: the model has no input {name!r} to explain, only {', '.join(inputs)}", field="input")
    given = inputs[name]
    if not isinstance(given, torch.Tensor):
        raise InvalidRequest(f"input: {name} holds BYTES, which have no derivative", field="input")
    carry = {key: ordinary(value) for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    if given.is_floating_point():
        leaf = carry[name] = _leaf(given, at, name)
        return Tape(_tensors(engine.run(dict(carry))), {name: leaf})
    embedding = engine.embedding(name)
    if embedding is None:
        raise InvalidRequest(f"input: {name} is an integer input without an embedding, which has no derivative", field="input")
    leaves: list[torch.Tensor] = []

    def replace(_: torch.nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        leaves.append(_leaf(output, at, name))
        return leaves[-1]

    hook = embedding.register_forward_hook(replace)
    try:
        outputs = _tensors(engine.run(dict(carry)))
    finally:
        hook.remove()
    if len(leaves) != 1:
        raise InvalidRequest(f"input: a step uses the embedding of {name} {len(leaves)} times, which cannot be explained", field="input")
    return Tape(outputs, {name: leaves[0]})


def later_stage(engine: Engine, carry: Mapping[str, torch.Tensor]) -> Tape:
    """Runs a stage on what the one before returned; every floating-point tensor of it is a leaf."""
    leaves = {name: ordinary(tensor).detach().requires_grad_() for name, tensor in carry.items() if tensor.is_floating_point()}
    return Tape(_tensors(engine.run({**carry, **leaves})), leaves)


def score_of(outputs: Mapping[str, torch.Tensor], target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """(the target of each row [rows], the flat index of the element chosen in each row [rows] or empty).

    Raises InvalidRequest where the target names no element of the outputs.
    """
    output = outputs.get(target.output)
    if output is None:
        raise InvalidRequest(f"target.output: the model has no output {target.output!r}, only {', '.join(outputs)}", field="target.output")
    if not output.is_floating_point():
        raise InvalidRequest(f"target.output: {target.output} is {output.dtype}, which has no derivative", field="target.output")
    none = torch.empty(0, dtype=torch.int64)
    flat = output.flatten(1)
    if target.weights is not None:
        weights = target.weights.to(output)
        if weights.shape != output.shape[1:]:
            raise InvalidRequest(
                f"target.weights: must have the shape {list(output.shape[1:])} of one row of {target.output}, got {list(weights.shape)}",
                field="target.weights",
            )
        return (output * weights).flatten(1).sum(1), none
    if target.index is not None:
        return _element(output, target), none
    chosen = flat.argmax(1) if target.flat is None else target.flat.to(output.device)
    return flat.gather(1, chosen.unsqueeze(1)).squeeze(1), chosen


def _element(output: torch.Tensor, target: Target) -> torch.Tensor:
    index = target.index or ()
    shape = output.shape[1:]
    if len(index) != len(shape) or any(not -extent <= place < extent for place, extent in zip(index, shape, strict=True)):
        raise InvalidRequest(
            f"target.index: {list(index)} is no element of a row of {target.output}, whose shape is {list(shape)}", field="target.index"
        )
    places: list[slice | int] = [slice(None), *index]
    return output[tuple(places)]


def _leaf(value: torch.Tensor, at: torch.Tensor | None, name: str) -> torch.Tensor:
    if at is None:
        return value.detach().clone().requires_grad_()
    if at.shape != value.shape:
        raise InvalidRequest(f"baseline: {name} has shape {list(value.shape)}, got {list(at.shape)}", field="baseline")
    return at.detach().to(value).clone().requires_grad_()


def ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor made under inference_mode cannot be saved for a backward pass; its copy can. One that was received may be such: TensorPipe
    reads in whatever thread calls it, the torch thread too."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor


def _tensors(outputs: Outputs) -> dict[str, torch.Tensor]:
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


class LocalDifferentiator:
    """`Differentiator` of a model that lives in this rank alone. Called in the torch thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def gradient(self, inputs: Inputs, name: str, at: torch.Tensor | None, target: Target) -> Gradient:
        with torch.inference_mode(False), torch.enable_grad():
            tape = first_stage(self._engine, inputs, name, at)
            score, chosen = score_of(tape.outputs, target)
            leaf = tape.leaves[name]
            (gradient,) = torch.autograd.grad(score.sum(), (leaf,), allow_unused=True) if score.requires_grad else (None,)
        return Gradient(leaf.detach(), torch.zeros_like(leaf) if gradient is None else gradient, score.detach(), chosen)

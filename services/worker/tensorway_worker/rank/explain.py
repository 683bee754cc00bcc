"""What Explain returns, built on one primitive: the derivative of a target with respect to an input or its embedding.

    saliency              |d score / d x|                                  Simonyan et al., 2013
    input_x_gradient      x * d score / d x                                Shrikumar et al., 2016
    integrated_gradients  (x - x0) * mean of d score / d x on the way from a baseline x0 to x    Sundararajan et al., 2017

Attributions to an embedded input are given for each element of the input: the embedding's dimension is summed (saliency: its L2 norm).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy
import torch

from tensorway.errors import InvalidRequest
from tensorway.model import Inputs, Outputs
from tensorway.signature import RevisionSpec
from tensorway_worker.engines.port import Engine
from tensorway_worker.rank.gradient_port import Differentiator, Gradient, Target
from tensorway_worker.rank.group_port import RankGroup

SALIENCY: Final = "saliency"
INPUT_X_GRADIENT: Final = "input_x_gradient"
INTEGRATED_GRADIENTS: Final = "integrated_gradients"
METHODS: Final = (SALIENCY, INPUT_X_GRADIENT, INTEGRATED_GRADIENTS)
#: Points on the way from the baseline where the order does not say. Captum's default, too.
DEFAULT_NUM_POINTS: Final = 50
MAX_NUM_POINTS: Final = 1000


@dataclass(frozen=True, slots=True)
class ExplainOrder:
    """What is to be explained, and how."""

    method: str
    #: Name of the input.
    input: str
    target: Target
    #: Points of integrated gradients; 0 for the default.
    num_points: int = 0
    #: Value of every element of the baseline, of the input or its embedding.
    baseline: float = 0.0
    #: `vjp`, `dist_autograd`, or empty for what fits.
    differentiation: str = ""


class Explainer:
    """Carries out orders, in the thread that runs steps."""

    def __init__(self, group: RankGroup, engine: Engine, spec: RevisionSpec) -> None:
        self._group = group
        self._engine = engine
        self._output = spec.signature.outputs[0].name
        #: Points of integrated gradients share a step up to this many rows.
        self._max_rows = spec.batching.max_rows

    def explain(self, inputs: Inputs, order: ExplainOrder) -> Outputs:
        """`attribution` (float, one number for each element of the input), `score` [rows], `chosen` [rows] (the flat index of the element
        of the output whose derivative it is; -1 where the target named it), and for integrated gradients `gap` [rows]: by how much the
        attributions of a row miss score(x) - score(baseline), which they should add up to.

        Raises InvalidRequest where the order does not fit the model.
        """
        if order.method not in METHODS:
            raise InvalidRequest(f"method: must be one of {', '.join(METHODS)}, got {order.method!r}", field="method")
        if not 0 <= order.num_points <= MAX_NUM_POINTS:
            raise InvalidRequest(f"num_points: {order.num_points} is outside 0 to {MAX_NUM_POINTS}", field="num_points")
        order = self._completed(order, inputs)
        differentiator = self._group.differentiator(order.differentiation)
        at_input = differentiator.gradient(inputs, order.input, None, order.target)
        is_embedded = at_input.value.ndim > inputs[order.input].ndim
        outputs: Outputs = {"score": at_input.score, "chosen": _chosen(at_input)}
        tokens = self._engine.tokens(order.input, inputs[order.input])
        if tokens is not None:
            outputs["tokens"] = tokens
        if order.method == SALIENCY:
            gradient = at_input.gradient
            outputs["attribution"] = gradient.norm(dim=-1) if is_embedded else gradient.abs()
            return outputs
        if order.method == INPUT_X_GRADIENT:
            full = at_input.value * at_input.gradient
        else:
            full, outputs["gap"] = self._integrated(differentiator, inputs, order, at_input)
        outputs["attribution"] = full.sum(dim=-1) if is_embedded else full
        return outputs

    def _completed(self, order: ExplainOrder, inputs: Inputs) -> ExplainOrder:
        """With the input and the output that the order leaves open. Raises InvalidRequest where no input has a derivative."""
        target = order.target if order.target.output else replace(order.target, output=self._output)
        if order.input:
            return replace(order, target=target)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and (value.is_floating_point() or self._engine.embedding(name) is not None):
                return replace(order, target=target, input=name)
        raise InvalidRequest(f"input: none of {', '.join(inputs)} has a derivative or an embedding", field="input")

    def _integrated(
        self, differentiator: Differentiator, inputs: Inputs, order: ExplainOrder, at_input: Gradient
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attributions of integrated gradients, same shape as the value, and the gap of each row."""
        value = at_input.value
        baseline = torch.full_like(value, order.baseline)
        # On the way from the baseline another element may become the largest: the one of the real input is kept.
        chosen = at_input.chosen if at_input.chosen.numel() else None
        target = order.target if chosen is None else replace(order.target, flat=chosen)
        mean = torch.zeros_like(value)
        for weights, points in self._points(order, len(value)):
            batch = torch.cat([baseline + point * (value - baseline) for point in points])
            on_the_way = target if chosen is None else replace(target, flat=chosen.repeat(len(points)))
            found = differentiator.gradient(_repeat(inputs, len(points)), order.input, batch, on_the_way)
            parts = found.gradient.reshape(len(points), *value.shape)
            mean += torch.einsum("p,p...->...", torch.tensor(weights, dtype=parts.dtype, device=parts.device), parts)
        attribution = (value - baseline) * mean
        at_baseline = differentiator.gradient(inputs, order.input, baseline, target)
        return attribution, attribution.flatten(1).sum(1) - (at_input.score - at_baseline.score)

    def _points(self, order: ExplainOrder, rows: int) -> list[tuple[list[float], list[float]]]:
        """Gauss-Legendre weights and points on [0, 1], in portions that fit a step."""
        places, weights = numpy.polynomial.legendre.leggauss(order.num_points or DEFAULT_NUM_POINTS)
        share = max(1, self._max_rows // max(1, rows))
        pairs = [(float(weight) / 2, (float(place) + 1) / 2) for place, weight in zip(places, weights, strict=True)]
        portions = [pairs[start : start + share] for start in range(0, len(pairs), share)]
        return [([weight for weight, _ in portion], [point for _, point in portion]) for portion in portions]


def _chosen(found: Gradient) -> torch.Tensor:
    return found.chosen if found.chosen.numel() else torch.full((len(found.score),), -1, dtype=torch.int64)


def _repeat(inputs: Inputs, times: int) -> Inputs:
    """All rows, `times` times over."""
    return {
        name: value.repeat(times, *([1] * (value.ndim - 1))) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }

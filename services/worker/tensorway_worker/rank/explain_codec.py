"""ExplainOptions as the rank's own order."""

from __future__ import annotations

from typing import Final

import torch

from tensorway.errors import InvalidRequest
from tensorway.tensors import DataType, check_num_bytes
from tensorway.v1 import inference_pb2, tensor_pb2
from tensorway_worker.rank.explain import INPUT_X_GRADIENT, INTEGRATED_GRADIENTS, SALIENCY, ExplainOrder
from tensorway_worker.rank.gradient_port import Target
from tensorway_worker.rank.received import flat_tensor

_METHODS: Final = {
    inference_pb2.EXPLAIN_METHOD_UNSPECIFIED: INTEGRATED_GRADIENTS,
    inference_pb2.EXPLAIN_METHOD_SALIENCY: SALIENCY,
    inference_pb2.EXPLAIN_METHOD_INPUT_X_GRADIENT: INPUT_X_GRADIENT,
    inference_pb2.EXPLAIN_METHOD_INTEGRATED_GRADIENTS: INTEGRATED_GRADIENTS,
}
_DIFFERENTIATIONS: Final = {
    inference_pb2.DIFFERENTIATION_UNSPECIFIED: "",
    inference_pb2.DIFFERENTIATION_VJP: "vjp",
    inference_pb2.DIFFERENTIATION_DIST_AUTOGRAD: "dist_autograd",
}


def read_order(options: inference_pb2.ExplainOptions) -> ExplainOrder:
    """Raises InvalidRequest naming the option that is none."""
    if options.method not in _METHODS:
        raise InvalidRequest(f"options.method: {options.method} is no method", field="options.method")
    if options.differentiation not in _DIFFERENTIATIONS:
        raise InvalidRequest(f"options.differentiation: {options.differentiation} is none", field="options.differentiation")
    target = options.target
    if target.index and target.HasField("weights"):
        raise InvalidRequest("options.target: give an index or weights, not both", field="options.target")
    return ExplainOrder(
        method=_METHODS[options.method],
        input=options.input,
        target=Target(
            target.output,
            tuple(target.index) if target.index else None,
            _read_weights(target.weights) if target.HasField("weights") else None,
        ),
        num_points=options.num_points,
        baseline=options.baseline,
        differentiation=_DIFFERENTIATIONS[options.differentiation],
    )


def _read_weights(tensor: tensor_pb2.Tensor) -> torch.Tensor:
    if int(tensor.dtype) != DataType.FP32:
        raise InvalidRequest("options.target.weights: must be FP32", field="options.target.weights")
    content = tensor.data
    check_num_bytes(DataType.FP32, tensor.shape, content, "options.target.weights")
    if not content:
        raise InvalidRequest("options.target.weights: is empty", field="options.target.weights")
    return flat_tensor(content, torch.float32).reshape(tuple(tensor.shape))

"""What a client may ask of Explain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tensorway.errors import InvalidRequest
from tensorway.tensors import DataType
from tensorway.v1 import inference_pb2, tensor_pb2

METHODS: Final = {
    "saliency": inference_pb2.EXPLAIN_METHOD_SALIENCY,
    "input_x_gradient": inference_pb2.EXPLAIN_METHOD_INPUT_X_GRADIENT,
    "integrated_gradients": inference_pb2.EXPLAIN_METHOD_INTEGRATED_GRADIENTS,
}
DIFFERENTIATIONS: Final = {
    "": inference_pb2.DIFFERENTIATION_UNSPECIFIED,
    "vjp": inference_pb2.DIFFERENTIATION_VJP,
    "dist_autograd": inference_pb2.DIFFERENTIATION_DIST_AUTOGRAD,
}


@dataclass(frozen=True, slots=True)
class Explain:
    """What is to be explained, and how; see `ExplainOptions` in inference.proto.

        client.explain("minilm", {"text": ["a cat"]}, Explain(output="embedding", weights=other_embedding))
    """

    #: `saliency`, `input_x_gradient` or `integrated_gradients`.
    method: str = "integrated_gradients"
    #: Name of the input; empty for the first that has a derivative.
    input: str = ""
    #: Name of the output; empty for the first.
    output: str = ""
    #: Index of the element within a row of the output; None for `weights`, or the largest element.
    index: tuple[int, ...] | None = None
    #: Array in the shape of one row of the output: the score is the sum of output x weights.
    weights: Any = None
    #: Points of integrated gradients; 0 for the default.
    num_points: int = 0
    #: Value of every element of the baseline.
    baseline: float = 0.0
    #: `vjp`, `dist_autograd`, or empty for what fits the group.
    differentiation: str = ""

    def to_options(self) -> inference_pb2.ExplainOptions:
        """As the wire has it. Raises InvalidRequest naming the field that cannot be sent."""
        if self.method not in METHODS:
            raise InvalidRequest(f"method: must be one of {', '.join(METHODS)}, got {self.method!r}", field="method")
        if self.differentiation not in DIFFERENTIATIONS:
            known = ", ".join(name for name in DIFFERENTIATIONS if name)
            raise InvalidRequest(f"differentiation: must be one of {known}, got {self.differentiation!r}", field="differentiation")
        target = inference_pb2.ExplainTarget(output=self.output, index=self.index or ())
        if self.weights is not None:
            target.weights.CopyFrom(_weights(self.weights))
        try:
            return inference_pb2.ExplainOptions(
                method=METHODS[self.method], input=self.input, target=target, num_points=self.num_points, baseline=self.baseline,
                differentiation=DIFFERENTIATIONS[self.differentiation],
            )
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"explain: {error}", field="options") from error


def _weights(value: Any) -> tensor_pb2.Tensor:
    from tensorway.arrays import to_tensor

    tensor = to_tensor("weights", value)
    if tensor.dtype is not DataType.FP32:
        raise InvalidRequest(f"weights: must be FP32, got {tensor.dtype.name}; cast the array to float32", field="weights")
    return tensor_pb2.Tensor(name="weights", dtype=int(tensor.dtype), shape=tensor.shape, data=bytes(tensor.data))  # type: ignore[arg-type]

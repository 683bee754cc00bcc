"""What Explain makes of derivatives, on functions whose attributions are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

from tensorway.errors import InvalidRequest
from tensorway.model_directory import load_directory
from tensorway_worker.rank.differentiation import LocalDifferentiator
from tensorway_worker.rank.explain import Explainer, ExplainOrder
from tensorway_worker.rank.gradient_port import Target
from tensorway_worker.rank.received import bytes_of
from tensorway_worker.rank.solo import SoloGroup

_YAML = """
name: known
engine: python
inputs: [{name: x, dtype: FP32, shape: [rows, 3]}]
outputs: [{name: y, dtype: FP32, shape: [rows, 2]}]
batching: {max_rows: 4}
"""


class Known:
    """Runs a function as an engine would; `ids` is embedded."""

    device = "cpu"

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.function = function
        self.table = torch.nn.Embedding(9, 3, _weight=torch.arange(27.0).reshape(9, 3)).requires_grad_(False)
        self.most_rows = 0

    def run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = inputs["x"] if "x" in inputs else self.table(inputs["ids"]).sum(1)
        self.most_rows = max(self.most_rows, len(x))
        return {"y": self.function(x)}

    def embedding(self, name: str) -> torch.nn.Module | None:
        return self.table if name == "ids" else None

    def tokens(self, name: str, value: object) -> object:
        if name != "ids":
            return None
        return numpy.array([[str(int(one)).encode() for one in row] for row in value], dtype=object)


def explainer(tmp_path: Path, engine: Known) -> Explainer:
    (tmp_path / "model.yaml").write_text(_YAML)
    return Explainer(SoloGroup(engine), engine, load_directory(tmp_path).spec)


X = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 2.0]])
WEIGHT = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, 1.0]])


def linear(x: torch.Tensor) -> torch.Tensor:
    return x @ WEIGHT.T


def cubic(x: torch.Tensor) -> torch.Tensor:
    return (x**3) @ WEIGHT.T + 1.0


def test_attributions_of_a_linear_function(tmp_path: Path) -> None:
    subject = explainer(tmp_path, Known(linear))
    for method, wanted in (
        ("saliency", WEIGHT[1].abs().expand(2, 3)), ("input_x_gradient", X * WEIGHT[1]), ("integrated_gradients", X * WEIGHT[1]),
    ):
        found = subject.explain({"x": X}, ExplainOrder(method, "x", Target("y", index=(1,))))
        torch.testing.assert_close(found["attribution"], wanted)
        torch.testing.assert_close(found["score"], linear(X)[:, 1])
        assert found["chosen"].tolist() == [-1, -1]


def test_integrated_gradients_are_complete_and_keep_the_element_of_the_real_input(tmp_path: Path) -> None:
    engine = Known(cubic)
    found = explainer(tmp_path, engine).explain({"x": X}, ExplainOrder("integrated_gradients", "", Target(""), num_points=5))
    scores = cubic(X)
    assert found["chosen"].tolist() == scores.argmax(1).tolist()
    torch.testing.assert_close(found["attribution"], X**3 * WEIGHT[found["chosen"]])
    torch.testing.assert_close(found["attribution"].sum(1), scores.max(1).values - 1.0)
    assert found["gap"].abs().max() < 1e-4
    assert engine.most_rows <= 4


def test_a_baseline_and_weights(tmp_path: Path) -> None:
    weights = torch.tensor([2.0, -1.0])
    order = ExplainOrder("integrated_gradients", "x", Target("y", weights=weights), baseline=1.0)
    found = explainer(tmp_path, Known(linear)).explain({"x": X}, order)
    torch.testing.assert_close(found["attribution"], (X - 1.0) * (weights @ WEIGHT))


def test_an_embedded_input_has_one_number_for_each_token(tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2], [3, 8]])
    found = explainer(tmp_path, Known(linear)).explain({"ids": ids}, ExplainOrder("integrated_gradients", "ids", Target("y", index=(0,))))
    rows = torch.arange(27.0).reshape(9, 3)[ids]
    torch.testing.assert_close(found["attribution"], (rows * WEIGHT[0]).sum(-1))
    assert found["tokens"].tolist() == [[b"1", b"2"], [b"3", b"8"]]
    found = explainer(tmp_path, Known(linear)).explain({"ids": ids}, ExplainOrder("saliency", "ids", Target("y", index=(0,))))
    torch.testing.assert_close(found["attribution"], WEIGHT[0].norm().expand(2, 2))


def test_inference_tensors_can_be_explained(tmp_path: Path) -> None:
    with torch.inference_mode():
        found = explainer(tmp_path, Known(cubic)).explain({"x": X.clone()}, ExplainOrder("saliency", "x", Target("y", index=(0,))))
    torch.testing.assert_close(found["attribution"], (3 * X**2 * WEIGHT[0]).abs())


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (ExplainOrder("guess", "x", Target("y")), "method: must be one of saliency"),
        (ExplainOrder("saliency", "z", Target("y")), "no input 'z'"),
        (ExplainOrder("saliency", "x", Target("w")), "no output 'w', only y"),
        (ExplainOrder("saliency", "x", Target("y", index=(2,))), r"\[2\] is no element of a row of y, whose shape is \[2\]"),
        (ExplainOrder("saliency", "x", Target("y", weights=torch.ones(3))), r"must have the shape \[2\] of one row of y, got \[3\]"),
        (ExplainOrder("saliency", "x", Target("y"), num_points=2000), "num_points: 2000 is outside"),
    ],
)
def test_orders_that_do_not_fit_are_the_callers_fault(tmp_path: Path, order: ExplainOrder, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        explainer(tmp_path, Known(linear)).explain({"x": X}, order)


def test_what_does_not_depend_on_the_input_has_no_attribution() -> None:
    found = LocalDifferentiator(Known(lambda x: torch.ones(len(x), 2))).gradient({"x": X}, "x", None, Target("y"))
    assert found.gradient.tolist() == torch.zeros_like(X).tolist()


def test_a_single_element_of_any_stride_has_its_bytes() -> None:
    odd = torch.arange(6.0).reshape(2, 3)[:1, 1]
    assert odd.stride() == (3,)
    assert bytes(bytes_of(odd)) == bytes(bytes_of(torch.tensor([1.0])))

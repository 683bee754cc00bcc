"""Units are measured alone, each kind once, and the model stays without weights."""

from __future__ import annotations

import torch

from tensorway_worker.engines.cut.empty import without_memory
from tensorway_worker.engines.cut.measure import measured_s
from tensorway_worker.engines.cut.own_weights import held_bytes
from tensorway_worker.engines.cut.tracer import trace
from tensorway_worker.engines.cut.trunk import Trunk


def test_heavy_units_take_longer_and_equal_ones_the_same() -> None:
    with without_memory():
        sizes = [(64, 64), (64, 64), (64, 4096), (4096, 4096), (4096, 64), (64, 64)]
        module = torch.nn.Sequential(*(torch.nn.Linear(*size) for size in sizes)).eval()
    trunk = Trunk(module, trace(module, lambda inputs: {"y": module(inputs["x"])}, {"x": torch.randn(16, 64)}))
    before = list(module.parameters())
    times = measured_s(trunk, module, "cpu")
    assert times[0] == times[1] == times[5]
    assert times[3] > 5 * times[0]
    assert all(one is other for one, other in zip(module.parameters(), before, strict=True))
    assert held_bytes(module) == 0


def test_a_unit_of_bfloat16_with_a_norm_and_a_mask_can_be_measured() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)

        def forward(self, hidden: torch.Tensor, *, mask: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(hidden)).masked_fill(mask == 0, 0) + hidden

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer() for _ in range(3))

        def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                hidden = layer(hidden, mask=mask)
            return hidden

    with without_memory():
        net = Net().eval().to(torch.bfloat16)
    example = {"hidden": torch.randn(4, 8, dtype=torch.bfloat16), "mask": torch.ones(4, 8, dtype=torch.int64)}
    trunk = Trunk(net, trace(net, lambda inputs: {"y": net(**inputs)}, example))
    assert [unit.name for unit in trunk.units] == ["layers.0", "layers.1", "layers.2"]
    assert all(time > 0 for time in measured_s(trunk, net, "cpu"))

"""All ranks of a cut model in one process, one after the other, and the model directories that the tests cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from tensorway.model import Inputs, Outputs
from tensorway.model_directory import load_directory
from tensorway_worker.engines import open_engine
from tensorway_worker.engines.cut.assembly import Uncut
from tensorway_worker.engines.cut.empty import without_memory
from tensorway_worker.engines.cut.own_weights import fill, kept_of, tied_names, untie
from tensorway_worker.engines.cut.part import Part, part_of
from tensorway_worker.engines.cut.stage import Stage
from tensorway_worker.engines.cut.tracer import trace
from tensorway_worker.engines.cut.trunk import Trunk
from tensorway_worker.engines.port import Cut, Engine
from tensorway_worker.topology import Place

SIGNATURE = """
inputs: [{name: x, dtype: INT64, shape: [rows]}, {name: w, dtype: FP32, shape: [rows]}]
outputs: [{name: y, dtype: FP32, shape: [rows, 50]}]
"""

NET = '''
import torch
from tensorway.model import Model


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 16)
        self.body = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU()) for _ in range(4)])
        self.norm = torch.nn.BatchNorm1d(16)
        self.head = torch.nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x, w):
        return self.head(self.norm(self.body(self.embed(x) * w)))


class Author(Model):
    def load(self, context):
        self.net = Net()
        context.load_into(self.net, "net.safetensors", "net.")
        self.net.to(context.device).eval()

    def forward(self, inputs):
        return {"y": self.net(inputs["x"], inputs["w"][:, None]) * 2.0}
'''

STAGES = '''

class First(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.embed = net.embed

    def forward(self, inputs):
        return self.embed(inputs["x"]) * inputs["w"][:, None], inputs["w"]


class Middle(torch.nn.Module):
    def __init__(self, layer, is_first):
        super().__init__()
        self.layer = layer
        self.is_first = is_first

    def forward(self, value):
        return {"hidden": self.layer(value[0] if self.is_first else value["hidden"])}


class Last(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.norm = net.norm
        self.head = net.head

    def forward(self, value):
        return {"y": self.head(self.norm(value["hidden"])) * 2.0}


class Staged(Author):
    def stages(self):
        return [First(self.net), *(Middle(layer, layer is self.net.body[0]) for layer in self.net.body), Last(self.net)]
'''


class Alone:
    """The collective of a stage with one shard."""

    shard = 0
    num_shards = 1

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor


class Agreement:
    """What rank 0 decides, every rank gets; but for the boundaries, where a test gives them (measured times are never the same)."""

    def __init__(self, *boundaries: int) -> None:
        self.said: dict[str, str] = {}
        self._boundaries = boundaries

    def __call__(self, key: str, decide: Callable[[], str]) -> str:
        if key not in self.said:
            decided = json.loads(decide())
            self.said[key] = json.dumps({**decided, "boundaries": self._boundaries} if self._boundaries else decided)
        return self.said[key]


def stages_of(path: Path, num_stages: int, agreement: Agreement | None = None) -> list[Engine]:
    """The loaded engines of a pipeline's ranks."""
    agree = agreement or Agreement()
    engines = [open_engine(load_directory(path), "cpu", Cut(Place(stage, num_stages), Alone(), agree)) for stage in range(num_stages)]
    for engine in engines:
        engine.load()
    return engines


def whole_of(path: Path) -> Engine:
    """The loaded engine of the uncut model."""
    engine = open_engine(load_directory(path), "cpu")
    engine.load()
    return engine


def chained(stages: list[Callable[[Inputs], Outputs]], inputs: Inputs) -> Outputs:
    """One batch through all stages."""
    carry = dict(inputs)
    with torch.inference_mode():
        for stage in stages:
            carry = stage(carry)
    return carry


def author_directory(folder: Path, *, staged: bool = False, code: str = NET + STAGES) -> Path:
    """A directory with a model.py and random weights for it; the tied head is in the file under the embedding's name only."""
    name = "Staged" if staged else "Author"
    (folder / "model.yaml").write_text(f"name: net\nengine: python\nsettings: {{class: {name}}}\n{SIGNATURE}")
    (folder / "model.py").write_text(code)
    (folder / "files").mkdir()
    found: dict[str, type[torch.nn.Module]] = {}
    exec(NET, found)
    torch.manual_seed(0)
    net = found["Net"]()
    torch.nn.init.normal_(net.norm.running_mean)
    state = {f"net.{name}": value.clone() for name, value in net.state_dict().items() if name != "head.weight"}
    save_file(state, folder / "files" / "net.safetensors")
    return folder


def author_inputs(rows: int) -> Inputs:
    generator = torch.Generator().manual_seed(rows)
    return {"x": torch.randint(0, 50, (rows,), generator=generator), "w": torch.rand(rows, generator=generator)}


class CutModule:
    """A module with random weights, cut by hand at given units, with everything that no stage should look at filled with NaN."""

    def __init__(self, build: Callable[[], torch.nn.Module], call: Callable[[torch.nn.Module, Inputs], Outputs], example: Inputs) -> None:
        self._build = build
        self._call = call
        torch.manual_seed(0)
        self._whole = build().eval().requires_grad_(False)
        self._empty, self.trunk = self._traced(example)

    def _traced(self, example: Inputs) -> tuple[torch.nn.Module, Trunk]:
        with without_memory():
            empty = self._build().eval()
        if hasattr(empty, "tie_weights"):
            empty.tie_weights()
        untie(empty)
        return empty, Trunk(empty, trace(empty, lambda inputs: self._call(empty, inputs), example))

    def whole(self, inputs: Inputs) -> Outputs:
        with torch.inference_mode():
            return self._call(self._whole, dict(inputs))

    def boundaries(self, num_stages: int) -> tuple[int, ...]:
        return tuple(round(stage * len(self.trunk.units) / num_stages) for stage in range(num_stages + 1))

    def stages(self, boundaries: tuple[int, ...]) -> list[Stage]:
        state: Mapping[str, torch.Tensor] = self._whole.state_dict()
        made: list[Stage] = []
        for stage in range(len(boundaries) - 1):
            part: Part = part_of(self.trunk, boundaries, stage)
            with without_memory():
                root = self._build().eval()
            fill(root, part.weights, tied_names(root), {}, kept_of(state, "cpu"), "cpu")
            made.append(Stage(root, lambda inputs, root=root: self._call(root, inputs), part, poison=True))
        return made


def uncut(name: str, root: torch.nn.Module, call: Callable[[Inputs], Outputs], example: Inputs) -> Uncut:
    """A model as the assembly takes it."""
    return Uncut(name, root, call, example, example, "cpu")

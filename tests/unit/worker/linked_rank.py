"""One rank of a linked group without a node: `python linked_rank.py RANK PIPELINE TENSOR FOLDER PROGRAM`.

The model is a chain of small layers, cut by stage and, with tensor shards, by columns then rows. PROGRAM names the function below that
rank 0 runs once the group has met; what it returns is printed as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import torch
from torch.distributed import FileStore

from tensorway_worker.engines.port import Collective
from tensorway_worker.rank.differentiation import LocalDifferentiator
from tensorway_worker.rank.gradient_port import Target
from tensorway_worker.rank.group import LinkedGroup
from tensorway_worker.rank.rpc import Membership
from tensorway_worker.topology import Place, Topology

#: `cpu`, or `cuda:0` where a test on such a machine says so.
DEVICE = os.environ.get("LINKED_DEVICE", "cpu")
WIDTH = 6
NUM_LAYERS = 4


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(context: object, tensor: torch.Tensor, collective: Collective) -> torch.Tensor:
        return collective.sum_(tensor.clone())

    @staticmethod
    def backward(context: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(context: object, tensor: torch.Tensor, collective: Collective) -> torch.Tensor:
        context.collective = collective
        return tensor.clone()

    @staticmethod
    def backward(context: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return context.collective.sum_(gradient.clone()), None


class Chain:
    """x -> x + down(tanh(up(x))), NUM_LAYERS times; `ids` pass through an embedding first. Refuses 13."""

    device = DEVICE

    def __init__(self, place: Place, collective: Collective | None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.table = torch.nn.Embedding(20, WIDTH, _weight=torch.randn(20, WIDTH, generator=generator)).requires_grad_(False).to(DEVICE)
        pair = ((12, WIDTH), (WIDTH, 12))
        layers = [tuple(torch.randn(shape, generator=generator) / 3 for shape in pair) for _ in range(NUM_LAYERS)]
        share = NUM_LAYERS // place.num_stages
        own = layers[place.stage * share : (place.stage + 1) * share]
        columns = 12 // place.num_shards
        part = slice(place.shard * columns, (place.shard + 1) * columns)
        self.layers = [(up[part].to(DEVICE), down[:, part].to(DEVICE)) for up, down in own]
        self.place, self.collective = place, collective

    def embedding(self, name: str) -> torch.nn.Module | None:
        return self.table if name == "ids" else None

    def run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        hidden = inputs["hidden"] if not self.place.is_first else inputs.get("x")
        if hidden is None:
            hidden = self.table(inputs["ids"]).sum(1)
        for up, down in self.layers:
            given = hidden if self.collective is None else _Copy.apply(hidden, self.collective)
            part = torch.tanh(given @ up.T) @ down.T
            hidden = hidden + (part if self.collective is None else _Sum.apply(part, self.collective))
        if not self.place.is_last:
            return {"hidden": hidden}
        if (hidden > 12).any():
            raise ValueError("too large")
        return {"y": hidden}


def whole() -> Chain:
    return Chain(Place(), None)


def inputs(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(DEVICE)}


def steps(group: LinkedGroup) -> object:
    """Steps of varying rows from several threads; the largest difference from the whole model."""
    differences: list[float] = []

    def drive(seed: int) -> None:
        for rows in (1, 7, 32, 3):
            given = inputs(rows, seed + rows)
            differences.append((group.run(given)["y"] - whole().run(given)["y"]).abs().max().item())

    threads = [threading.Thread(target=drive, args=(seed,)) for seed in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"steps": len(differences), "difference": max(differences)}


def failures(group: LinkedGroup) -> object:
    """A step that the last stage refuses, then one that it takes."""
    try:
        group.run({"x": torch.full((2, WIDTH), 50.0, device=DEVICE)})
    except Exception as error:  # noqa: BLE001 - shown to the test
        said = f"{type(error).__name__}: {error}"
    return {"said": said, "then": list(group.run(inputs(3))["y"].shape)}


def gradients(group: LinkedGroup) -> object:
    """Both differentiators beside local autograd, for an input and an embedding, concurrently with steps."""
    found: dict[str, float] = {}
    ids = {"ids": torch.tensor([[1, 2, 3], [4, 5, 6]], device=DEVICE)}
    local = LocalDifferentiator(whole())
    kinds = ["vjp"] if group.topology.tensor > 1 or DEVICE != "cpu" else ["vjp", "dist_autograd"]
    jobs = [(kind, given, name, target) for kind in kinds for given, name in ((inputs(3), "x"), (ids, "ids")) for target in (
        Target("y", index=(2,)), Target("y", weights=torch.arange(float(WIDTH))), Target("y"))]

    def take(kind: str, given: dict[str, torch.Tensor], name: str, target: Target, key: str) -> None:
        one, other = group.differentiator(kind).gradient(given, name, None, target), local.gradient(given, name, None, target)
        pairs = ((one.value, other.value), (one.gradient, other.gradient), (one.score, other.score))
        assert torch.equal(one.chosen, other.chosen)
        found[key] = max((left - right).abs().max().item() for left, right in pairs)

    threads = [threading.Thread(target=take, args=(*job, f"{job[0]} {job[2]} {number}")) for number, job in enumerate(jobs)]
    threads.append(threading.Thread(target=lambda: group.run(inputs(9))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = ""
    try:
        group.differentiator("vjp").gradient(inputs(2), "x", None, Target("z"))
    except Exception as error:  # noqa: BLE001 - shown to the test
        said = str(error)
    after = (group.run(inputs(2))["y"] - whole().run(inputs(2))["y"]).abs().max().item()
    return {"found": found, "jobs": len(jobs), "said": said, "after": after}


def listening(group: LinkedGroup) -> object:
    """Sockets on which this process still listens, now that the door is closed."""
    from tensorway_worker.rank.door import _sockets

    return {"sockets": sum(one.state == "0A" for one in _sockets()), "y": list(group.run(inputs(2))["y"].shape)}


def wait(group: LinkedGroup) -> object:
    """Steps until one fails."""
    print("waiting", flush=True)
    try:
        while True:
            group.run(inputs(4))
    except Exception as error:  # noqa: BLE001 - shown to the test
        return {"said": f"{type(error).__name__}: {error}"}


def greet_late(folder: Path) -> None:
    """Leaves the door open until the file `go` is there."""
    from tensorway_worker.rank import rpc

    greet = rpc._greet

    def late(*arguments: object) -> None:
        (folder / f"open-{sys.argv[1]}").touch()
        while not (folder / "go").exists():
            time.sleep(0.02)
        greet(*arguments)

    rpc._greet = late


PROGRAMS: dict[str, Callable[[LinkedGroup], object]] = {
    "steps": steps, "failures": failures, "gradients": gradients, "listening": listening, "wait": wait, "late": listening,
}


def main() -> None:
    rank, pipeline, tensor = map(int, sys.argv[1:4])
    folder, program = Path(sys.argv[4]), sys.argv[5]
    if program == "late":
        greet_late(folder)
    torch.set_num_threads(1)
    topology = Topology(pipeline, tensor)
    queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
    membership = Membership(rank, topology.world_size, 3, "ab" * 32, 20.0, DEVICE)
    group = LinkedGroup(topology, membership, folder, queue.put, lambda lost: print(f"lost: {lost}", file=sys.stderr, flush=True))
    collective = group.join(FileStore(str(folder / "store"), topology.world_size), "lo")
    place = topology.place(rank)
    group.attach(Chain(place, collective if place.num_shards > 1 else None))

    def serve() -> None:
        with torch.inference_mode():
            while True:
                queue.get()()

    threading.Thread(target=serve, daemon=True).start()
    if rank == 0:
        print(json.dumps(PROGRAMS[program](group)), flush=True)
        os._exit(0)
    sys.stdin.read()  # until the test closes it
    os._exit(0)


if __name__ == "__main__":
    main()

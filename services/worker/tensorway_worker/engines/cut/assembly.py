"""From a model without weights to the part that one rank runs: trace, agree on the boundaries, shard, load, and build the stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from tensorway.errors import FailedPrecondition
from tensorway.model import Inputs, Outputs
from tensorway_worker.engines.cut.balance import balanced
from tensorway_worker.engines.cut.chain import ChainStage
from tensorway_worker.engines.cut.measure import measured_s
from tensorway_worker.engines.cut.own_weights import Names, Read, fill, untie
from tensorway_worker.engines.cut.part import Part, part_of
from tensorway_worker.engines.cut.shards import Sharding, refuse_unsharded, shard_module
from tensorway_worker.engines.cut.stage import Stage
from tensorway_worker.engines.cut.tracer import trace
from tensorway_worker.engines.cut.trunk import Trunk, why_not
from tensorway_worker.engines.port import Cut


@dataclass(frozen=True, slots=True)
class Uncut:
    """A whole model on the meta device, and all that is needed to cut it."""

    name: str
    root: torch.nn.Module
    #: The whole step, by `root`'s modules.
    call: Callable[[Inputs], Outputs]
    #: Inputs of `call`, on the CPU. Extents that vary should be odd and differ from the model's own widths.
    example: Inputs
    #: The same at the size at which times are to be measured.
    sized_example: Inputs
    device: str
    #: `settings.tensor_plan` and the model's own plan.
    tensor_plan: Mapping[str, str] = field(default_factory=dict)
    #: `root` is a torch.nn.ModuleList of the author's `stages()`; `call` passes through them.
    is_chain: bool = False


@dataclass(frozen=True, slots=True)
class Assembled:
    """A rank's part, loaded."""

    stage: Stage | ChainStage
    part: Part
    sharding: Sharding
    #: Integer input -> the embedding module that gets it, where this rank holds it.
    embeddings: Mapping[str, torch.nn.Module]


def assembled(model: Uncut, cut: Cut, make_read: Callable[[], Read]) -> Assembled:
    """Cuts `model`, reads this rank's own weights and nothing else, and builds its stage. `model.root` becomes that part.

    Args:
        make_read: called once all ranks agree on the cut, so that a rank that builds a whole model to read from does not hold it longer
            than it must.

    Raises FailedPrecondition where the model cannot be cut like this, saying why, or a weight cannot be had.
    """
    names = untie(model.root)
    trunk = traced(model)
    boundaries = agreed_boundaries(model, trunk, names, cut)
    own = boundaries[cut.place.stage], boundaries[cut.place.stage + 1]
    part = chain_part(trunk, *own) if model.is_chain else part_of(trunk, boundaries, cut.place.stage)
    embeddings = dict(trunk.trace.embeddings) if cut.place.is_first else {}
    sharding = shard_module(model.root, model.tensor_plan, cut.place, cut.collective)
    refuse_unsharded(sharding, cut.place, model.name)
    # The trace holds what was computed from the example.
    del trunk
    weights = frozenset(names) if cut.place.num_stages == 1 else part.weights
    fill(model.root, weights, names, sharding.slices, make_read(), model.device)
    model.root.requires_grad_(False)
    stage = ChainStage(_modules(model.root), *own) if model.is_chain else Stage(model.root, model.call, part)
    return Assembled(stage, part, sharding, {name: model.root.get_submodule(module) for name, module in embeddings.items()})


def traced(model: Uncut, *, sized: bool = False) -> Trunk:
    """The model's trunk, from a trace of its example or its `sized_example`."""
    found = trace(model.root, model.call, model.sized_example if sized else model.example)
    return Trunk(model.root, found, is_chain=model.is_chain)


def chain_part(trunk: Trunk, begin: int, end: int) -> Part:
    """The part of a chain's units [begin, end): the weights of their modules."""
    modules = tuple(f"{call.name}." for unit in trunk.units[begin:end] for call in unit.calls)
    weights = frozenset(name for name in trunk.weights if name.startswith(modules))
    return Part(trunk.units[begin:end], (), None, weights, frozenset(), frozenset())


def _modules(root: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for _, module in root.named_children()]


def agreed_boundaries(model: Uncut, trunk: Trunk, names: Names, cut: Cut) -> tuple[int, ...]:
    """Where every rank of the group cuts; rank 0 measures and decides."""
    num_stages = cut.place.num_stages
    if num_stages == 1:
        return (0, len(trunk.units))
    if len(trunk.units) < num_stages:
        raise FailedPrecondition(
            f"{model.name} cannot be cut into {num_stages} pipeline stages: {why_not(trunk, num_stages)}", field="parallel.pipeline"
        )
    said = json.loads(cut.agree("cut", lambda: json.dumps(decided(model, trunk, names, num_stages))))
    boundaries = tuple(int(one) for one in said["boundaries"])
    if said["units"] != [unit.name for unit in trunk.units]:
        raise FailedPrecondition(f"{model.name}: the ranks found different parts to cut; do all run the same libraries?", field="parallel")
    return boundaries


def decided(model: Uncut, trunk: Trunk, names: Names, num_stages: int) -> dict[str, object]:
    """What rank 0 tells the others: unit names, their times and the boundaries. JSON values."""
    times_s = unit_times_s(model, trunk)
    balance = balanced(times_s, stage_bytes(trunk, names), num_stages, memory_limit_bytes(model.device))
    return {"units": [unit.name for unit in trunk.units], "times_s": times_s, "boundaries": list(balance.boundaries)}


def unit_times_s(model: Uncut, trunk: Trunk) -> list[float]:
    """Measured time of each unit at the size of `sized_example`."""
    sized = traced(model, sized=True)
    # A size may take another path through the code; then the times are those of the small example.
    is_alike = [unit.name for unit in sized.units] == [unit.name for unit in trunk.units]
    return measured_s(sized if is_alike else trunk, model.root, model.device)


def stage_bytes(trunk: Trunk, names: Names) -> Callable[[int, int], int]:
    """Bytes of the weights that a stage of units [first, last) holds; weights that it uses twice, and tied ones, count once."""
    used: list[set[str]] = []
    for unit in trunk.units:
        modules = tuple(f"{call.name}." for call in unit.calls)
        traced = {name for one in trunk.trace.operations[unit.begin : unit.end] for name in one.weights}
        used.append(traced | {name for name in trunk.weights if name.startswith(modules)})

    def size(first: int, last: int) -> int:
        return sum({min(names[name]): trunk.weights[name] for name in set[str]().union(*used[first:last])}.values())

    return size


def memory_limit_bytes(device: str, share: float = 0.85) -> int | None:
    """Most bytes of weights that a rank on `device` may hold, leaving room for activations; None on a CPU, where the node decides."""
    if not device.startswith("cuda"):
        return None
    _, total = torch.cuda.mem_get_info(device)
    return int(total * share)


def stage_times_s(times_s: Sequence[float], boundaries: Sequence[int]) -> list[float]:
    """Time of each stage: the sum of its units'."""
    return [sum(times_s[begin:end]) for begin, end in pairwise(boundaries)]

"""What a cut of a model would mean for each rank: weights, memory, time. From a trace and from measured times, without loading weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tensorway.errors import FailedPrecondition
from tensorway_worker.engines.cut.assembly import (
    Uncut,
    chain_part,
    memory_limit_bytes,
    stage_bytes,
    stage_times_s,
    traced,
    unit_times_s,
)
from tensorway_worker.engines.cut.balance import balanced, busy_shares, pipelined_s
from tensorway_worker.engines.cut.own_weights import Names, untie
from tensorway_worker.engines.cut.part import Part, part_of
from tensorway_worker.engines.cut.shards import Sharding, shard_module
from tensorway_worker.engines.cut.tensor_plan import summary
from tensorway_worker.engines.cut.trunk import Trunk, label, why_not
from tensorway_worker.topology import Place, Topology


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One rank."""

    rank: int
    stage: int
    shard: int
    #: Its run of modules, in words.
    holds: str
    num_modules: int
    weights_bytes: int
    #: Most bytes of activations alive at once in a step of `rows` rows.
    activation_bytes: int
    #: Computing time of a step, without waiting for others.
    time_s: float
    #: Share of the time that it computes while batches follow each other without a gap.
    busy_share: float
    #: Sums over shards in one step, and the time that they take.
    num_sums: int
    sums_s: float


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """The whole group."""

    model: str
    pipeline: int
    tensor: int
    device: str
    threads: int
    rows: int
    hop_s: float
    #: The whole model on one rank.
    whole_weights_bytes: int
    whole_activation_bytes: int
    whole_time_s: float
    ranks: tuple[RankPlan, ...]
    #: Number of micro-batches -> predicted time of a step.
    step_s: Mapping[int, float]
    #: Shapes of the inputs that all of this is for.
    inputs: Mapping[str, tuple[int, ...]]
    #: Units between which a cut is possible.
    num_units: int
    #: What stays whole or in one piece, and why.
    not_cut: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for."""

    pipeline: int
    tensor: int
    rows: int
    #: Measured time for one hop or one sum between ranks.
    hop_s: float
    micro_batches: tuple[int, ...] = (1, 2, 4)
    notes: tuple[str, ...] = field(default_factory=tuple)


class NoOthers:
    """A shard that is never run."""

    def __init__(self, shard: int, num_shards: int) -> None:
        self.shard = shard
        self.num_shards = num_shards

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a plan runs nothing")

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        raise AssertionError("a plan runs nothing")


def planned(model: Uncut, wish: Wish) -> ModelPlan:
    """The plan of `model`, whose layers may be replaced by a shard's on the way.

    Raises FailedPrecondition where it cannot be cut like this, saying why.
    """
    names = untie(model.root)
    trunk = traced(model)
    sized = traced(model, sized=True)
    if len(trunk.units) < wish.pipeline:
        raise FailedPrecondition(
            f"{model.name} cannot be cut into {wish.pipeline} pipeline stages: {why_not(trunk, wish.pipeline)}", field="parallel.pipeline"
        )
    size_of = stage_bytes(trunk, names)
    looked_up = {f"{name}.weight" for name, module in model.root.named_modules() if isinstance(module, torch.nn.Embedding)}
    times_s = unit_times_s(model, trunk)
    balance = balanced(times_s, size_of, wish.pipeline, memory_limit_bytes(model.device))
    parts = [
        chain_part(trunk, begin, balance.boundaries[stage + 1]) if model.is_chain else part_of(trunk, balance.boundaries, stage)
        for stage, begin in enumerate(balance.boundaries[:-1])
    ]
    sharding = shard_module(model.root, model.tensor_plan, Place(0, wish.pipeline, 0, wish.tensor), NoOthers(0, wish.tensor))
    shares = [_share(part, trunk.weights, names, sharding, wish.tensor, looked_up) for part in parts]
    ranks = _ranks(wish, parts, shares, times_s, balance.boundaries, sized if _is_alike(sized, trunk) else trunk)
    stages = [rank.time_s + rank.sums_s for rank in ranks if rank.shard == 0]
    return ModelPlan(
        model=model.name, pipeline=wish.pipeline, tensor=wish.tensor, device=model.device, threads=torch.get_num_threads(), rows=wish.rows,
        hop_s=wish.hop_s, whole_weights_bytes=size_of(0, len(trunk.units)), whole_activation_bytes=max(sized.live_bytes),
        whole_time_s=sum(times_s), ranks=tuple(ranks),
        step_s={count: pipelined_s(stages, wish.hop_s, count) for count in wish.micro_batches if count == 1 or _may_split(wish, count)},
        inputs={name: tuple(value.shape) for name, value in model.sized_example.items()},
        num_units=len(trunk.units), not_cut=_not_cut(trunk, sharding, wish, model.name), notes=wish.notes,
    )


def _ranks(
    wish: Wish, parts: Sequence[Part], shares: Sequence[_Share], times_s: Sequence[float], boundaries: Sequence[int], sized: Trunk
) -> list[RankPlan]:
    topology = Topology(wish.pipeline, wish.tensor)
    num_sums = [share.num_sums for share in shares]
    computing_s = [time * share.work for time, share in zip(stage_times_s(times_s, boundaries), shares, strict=True)]
    busy = busy_shares([time + sums * wish.hop_s for time, sums in zip(computing_s, num_sums, strict=True)])
    ranks: list[RankPlan] = []
    for rank in range(topology.world_size):
        place = topology.place(rank)
        part = parts[place.stage]
        own = sized.units[boundaries[place.stage] : boundaries[place.stage + 1]]
        ranks.append(
            RankPlan(
                rank=rank, stage=place.stage, shard=place.shard, holds=label(part.units), num_modules=len(part.units),
                weights_bytes=shares[place.stage].num_bytes, activation_bytes=max(sized.live_bytes[own[0].begin : own[-1].end + 1]),
                time_s=computing_s[place.stage], busy_share=busy[place.stage], num_sums=num_sums[place.stage],
                sums_s=num_sums[place.stage] * wish.hop_s,
            )
        )
    return ranks


@dataclass(frozen=True, slots=True)
class _Share:
    """What a shard has of a stage."""

    num_bytes: int
    #: Of the stage's computing time; a layer's work is taken to go with the size of its weights.
    work: float
    num_sums: int


def _share(
    part: Part, whole_bytes: Mapping[str, int], names: Names, sharding: Sharding, num_shards: int, looked_up: Collection[str]
) -> _Share:
    own = {name: whole_bytes[name] // (num_shards if name in sharding.slices else 1) for name in part.weights}
    # Tied weights that are cut alike are held once.
    held = {(min(names[name]), sharding.slices.get(name)): size for name, size in own.items()}
    # An embedding's table is looked up, not multiplied with: its bytes are no work.
    worked = [name for name in part.weights if name not in looked_up]
    total = sum(whole_bytes[name] for name in worked)
    num_sums = sum(1 for name in part.weights if name in sharding.slices and sharding.slices[name].dim == 1)
    return _Share(sum(held.values()), sum(own[name] for name in worked) / total if total else 1.0, num_sums)


def _may_split(wish: Wish, count: int) -> bool:
    return wish.pipeline > 1 and count <= wish.rows


def _is_alike(sized: Trunk, trunk: Trunk) -> bool:
    return [unit.name for unit in sized.units] == [unit.name for unit in trunk.units]


def _not_cut(trunk: Trunk, sharding: Sharding, wish: Wish, name: str) -> tuple[str, ...]:
    found: list[str] = []
    if wish.tensor > 1:
        found += [f"tensor: kept whole on every shard: {line}" for line in summary(sharding.kept_whole)]
        if not sharding.slices:
            found.append(f"tensor: nothing of {name} can be cut into {wish.tensor} shards; a group would refuse to start")
    if wish.pipeline > 1:
        found += [f"pipeline: no cut after {refusal.module}: {refusal.reason}" for refusal in trunk.refusals]
    return tuple(found)

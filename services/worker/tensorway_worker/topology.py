"""Ranks, stages, shards and devices of a group. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Where one rank stands in its group: which run of layers it holds, and which slice of their tensors."""

    stage: int = 0
    num_stages: int = 1
    shard: int = 0
    num_shards: int = 1

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def is_cut(self) -> bool:
        """Whether it holds less than the whole model."""
        return self.num_stages * self.num_shards > 1


@dataclass(frozen=True, slots=True)
class Topology:
    """A group of `pipeline` stages x `tensor` shards. Rank = stage x tensor + shard; rank 0 is the leader."""

    pipeline: int
    tensor: int

    @property
    def world_size(self) -> int:
        return self.pipeline * self.tensor

    def place(self, rank: int) -> Place:
        """Where `rank` stands."""
        return Place(rank // self.tensor, self.pipeline, rank % self.tensor, self.tensor)

    def rank(self, stage: int, shard: int) -> int:
        """Who stands there."""
        return stage * self.tensor + shard

    def stage_ranks(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold the shards of `stage`."""
        return tuple(range(stage * self.tensor, (stage + 1) * self.tensor))


def assign_devices(devices: Sequence[str], world_size: int, in_use: Sequence[str]) -> tuple[str, ...]:
    """A device for each rank, the least used first, then round robin in the order of `devices`; `cpu` where there is none."""
    if not devices:
        return ("cpu",) * world_size
    use = {device: in_use.count(device) for device in devices}
    assigned: list[str] = []
    for _ in range(world_size):
        device = min(devices, key=lambda name: (use[name], devices.index(name)))
        use[device] += 1
        assigned.append(device)
    return tuple(assigned)


def threads_per_rank(num_cores: int, world_size: int, wanted: int) -> int:
    """Torch threads of one rank: what is wanted, else the cores divided among the ranks of the group."""
    return wanted or max(1, num_cores // world_size)

"""Sums and joins over the shards of one stage: gloo between CPU ranks, NCCL between GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, Store

from tensorway_worker.engines.port import Collective
from tensorway_worker.rank.group_port import GroupLost, first_line
from tensorway_worker.topology import Place, Topology

#: A silent peer is its node's to find; this bound only has to exist.
_TIMEOUT: Final = timedelta(hours=1)


class SingleShard:
    """The collective of a stage that is held by one rank."""

    shard = 0
    num_shards = 1

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor


class ProcessCollective:
    """A process group of torch. Called in the torch thread, by all shards in the same order."""

    def __init__(self, group: distributed.ProcessGroup, shard: int, num_shards: int) -> None:
        self._group = group
        self.shard = shard
        self.num_shards = num_shards

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        with _losses():
            distributed.all_reduce(tensor, group=self._group)
        return tensor

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.num_shards)]
        with _losses():
            distributed.all_gather(parts, tensor, group=self._group)
        return torch.cat(parts, dim)


@contextmanager
def _losses() -> Iterator[None]:
    """gloo and NCCL say by a RuntimeError that a peer is gone: no fault of the model that was running."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise GroupLost(f"a shard of this stage was lost: {first_line(error)}") from error


def open_collective(topology: Topology, rank: int, store: Store, device: str) -> Collective:
    """The collective of `rank`'s stage. All ranks of the group call this; a lone shard needs no process group at all."""
    place: Place = topology.place(rank)
    if place.num_shards == 1:
        return SingleShard()
    distributed.init_process_group(
        "gloo", store=PrefixStore("shards", store), rank=rank, world_size=topology.world_size, timeout=_TIMEOUT
    )
    own: distributed.ProcessGroup | None = None
    for stage in range(topology.pipeline):
        # Every rank has to take part in the making of every group.
        made = distributed.new_group(list(topology.stage_ranks(stage)), backend="gloo" if device == "cpu" else "nccl", timeout=_TIMEOUT)
        if stage == place.stage:
            own = made
    if own is None:
        raise ValueError(f"rank {rank} is outside of {topology}")
    return ProcessCollective(own, place.shard, place.num_shards)

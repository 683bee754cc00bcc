"""Shards of one model in one process: a thread each, and a collective that really sums what the threads bring."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from tensorway_worker.engines.cut.empty import without_memory
from tensorway_worker.engines.cut.own_weights import fill, kept_of, reader, untie
from tensorway_worker.engines.cut.shards import Sharding, shard_module
from tensorway_worker.engines.cut.tensor_plan import plan_of
from tensorway_worker.engines.cut.weights_source import open_weights
from tensorway_worker.engines.port import Collective
from tensorway_worker.topology import Place

Result = TypeVar("Result")
#: Makes one shard: (place, collective) -> the model, loaded, and what was done to it.
MakeShard = Callable[[Place, Collective], tuple[Any, Sharding]]


class ThreadCollective:
    """One shard's side. Counts what it does, and fails instead of waiting where another shard does not come."""

    def __init__(self, shard: int, slots: list[torch.Tensor], barrier: threading.Barrier) -> None:
        self.shard = shard
        self.num_shards = len(slots)
        self.num_sums = self.num_gathers = 0
        self._slots = slots
        self._barrier = barrier

    def _all(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        assert tensor.is_contiguous()
        self._slots[self.shard] = tensor.clone()
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()
        assert len({one.shape for one in found}) == 1
        return found

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_sums += 1
        return tensor.copy_(torch.stack(self._all(tensor)).sum(0))

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        self.num_gathers += 1
        return torch.cat(self._all(tensor), dim)


class Shards:
    """All shards of a model."""

    def __init__(self, num_shards: int, make: MakeShard) -> None:
        self.barrier = threading.Barrier(num_shards, timeout=60)
        slots = [torch.empty(0)] * num_shards
        self.collectives = [ThreadCollective(shard, slots, self.barrier) for shard in range(num_shards)]
        made = [make(Place(shard=one.shard, num_shards=num_shards), one) for one in self.collectives]
        self.models = [model for model, _ in made]
        self.shardings = [sharding for _, sharding in made]

    def run(self, call: Callable[[Any], Result]) -> list[Result]:
        """`call(model)` of every shard at once."""

        def one(model: Any) -> Result:
            try:
                return call(model)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(len(self.models)) as threads:
            return [future.result() for future in [threads.submit(one, model) for model in self.models]]


def from_file(build: Callable[[], Any], path: Path) -> MakeShard:
    """Shards of a transformers model that read their slices of a weights file."""

    def make(place: Place, collective: Collective) -> tuple[Any, Sharding]:
        model = empty(build)
        source = open_weights(path, (), model)
        return sharded(model, plan_of(model), place, collective, reader(source, None, "cpu"))

    return make


def from_whole(build: Callable[[], Any], whole: Any, plan: Mapping[str, str] | None = None) -> MakeShard:
    """Shards that take their slices from a whole model in memory."""

    def make(place: Place, collective: Collective) -> tuple[Any, Sharding]:
        model = empty(build)
        return sharded(model, plan_of(model, plan), place, collective, kept_of(whole.state_dict(), "cpu"))

    return make


def empty(build: Callable[[], Any]) -> Any:
    """A model without memory for its weights, tied ones tied."""
    with without_memory():
        model = build()
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


def sharded(model: Any, plan: Mapping[str, str], place: Place, collective: Collective, read: Any) -> tuple[Any, Sharding]:
    """The model cut and loaded."""
    names = untie(model)
    sharding = shard_module(model, plan, place, collective)
    fill(model, frozenset(names), names, sharding.slices, read, "cpu")
    return model.requires_grad_(False), sharding

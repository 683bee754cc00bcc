"""How a rank gets its model: alone, or as a part of a group that meets first."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.distributed.distributed_c10d import Store

from tensorway.errors import TensorwayError
from tensorway.model_directory import ModelDirectory
from tensorway_worker.engines import open_engine
from tensorway_worker.engines.port import Cut, Engine, model_error
from tensorway_worker.rank.adaptation_linked import LinkedTraining
from tensorway_worker.rank.executor import Executor, Work
from tensorway_worker.rank.group import LinkedGroup
from tensorway_worker.rank.launch import RankLaunch
from tensorway_worker.rank.memory import open_guard
from tensorway_worker.rank.rpc import Membership
from tensorway_worker.rank.solo import SoloGroup
from tensorway_worker.topology import Topology

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Formed:
    """A rank with its part of the model, in its group."""

    engine: Engine
    group: LinkedGroup | SoloGroup


def join(launch: RankLaunch, directory: ModelDirectory, executor: Executor, store: Store) -> tuple[LinkedGroup, Cut]:
    """In the torch thread of a rank that is not alone: meets the others. Raises GroupLost where they do not come."""
    topology = Topology(launch.pipeline, launch.tensor)
    membership = Membership(
        launch.rank, launch.world_size, launch.epoch, launch.secret, directory.yaml.startup_timeout_s, launch.device
    )
    # A follower knows its steps by the parts that it runs; the leader counts whole ones.
    enqueue = executor.enqueue if launch.rank == 0 else partial(_enqueue_part, executor)
    group = LinkedGroup(topology, membership, directory.path, enqueue, executor.crash)
    # A step of a generation is no batch of rows: its pieces cannot be told apart by where they lie.
    group.is_batchable = directory.spec.signature.is_batchable and directory.yaml.generation is None
    group.wanted_micro_batches = directory.yaml.parallel.micro_batches
    # Its commands may come as soon as the ranks have met.
    training = LinkedTraining(group) if launch.adapt else None
    collective = group.join(store, launch.interface)
    if training is not None:
        training.collective = collective
    return group, Cut(topology.place(launch.rank), collective, partial(_agree, store, launch.rank))


def _enqueue_part(executor: Executor, work: Work) -> None:
    def part() -> None:
        began_s = executor.begin_step()
        try:
            work()
        finally:
            executor.end_step(began_s)

    executor.enqueue(part)


def _agree(store: Store, rank: int, key: str, decide: Callable[[], str]) -> str:
    """Rank 0 decides, the others hear of it."""
    if rank == 0:
        text = decide()
        store.set(f"agreed/{key}", text)
        return text
    return bytes(store.get(f"agreed/{key}")).decode()


def load(directory: ModelDirectory, launch: RankLaunch, cut: Cut | None, linked: LinkedGroup | None) -> Formed:
    """In the torch thread: the engine with its weights, attached to its group. Raises what the model raises, as a TensorwayError."""
    try:
        # Weights made under inference_mode could not take part in a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            engine = open_engine(directory, launch.device, cut)
            engine.load()
    except Exception as error:
        if not isinstance(error, TensorwayError):
            _LOG.exception("the model could not be loaded")
        raise model_error(error, directory.path, "load") from error
    fields = {"model": launch.model, "rank": launch.rank, "memory_bytes": engine.memory_bytes(), "device": launch.device}
    _LOG.info("loaded", extra={"fields": fields})
    guard = open_guard(directory, launch.device)
    if linked is None:
        return Formed(engine, SoloGroup(engine, guard))
    linked.attach(engine, guard)
    return Formed(engine, linked)

"""The load of a model, summed over what the orchestrators say. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensorway.loads import ModelLoad
from tensorway_gateway.models import Model


@dataclass(frozen=True, slots=True)
class SummedLoad:
    """Of one model's serving revision."""

    model: Model
    arrival_rows_per_s: float
    #: Mean over orchestrators, weighted by their arrivals.
    queue_s: float
    utilisation: float
    predicted_replicas: float
    waiting_rows: int
    num_open: int
    #: (orchestrator, what it says)
    parts: tuple[tuple[str, ModelLoad], ...]


def sum_loads(model: Model, said: Sequence[tuple[str, Sequence[ModelLoad]]]) -> SummedLoad:
    """The load of `model`, from what each live orchestrator says of all models."""
    revision = model.serving.spec.revision
    parts = tuple((id, load) for id, loads in said for load in loads if (load.model, load.revision) == (model.name, revision))
    loads = [load for _, load in parts]
    arrival = sum(load.arrival_rows_per_s for load in loads)
    num_groups = model.serving.num_ready_replicas
    return SummedLoad(
        model, arrival,
        sum(load.queue_s * load.arrival_rows_per_s for load in loads) / arrival if arrival else 0.0,
        min(1.0, sum(load.busy_groups for load in loads) / num_groups) if num_groups else 0.0,
        sum(load.predicted_replicas for load in loads),
        sum(load.waiting_rows for load in loads), sum(load.num_open for load in loads), parts,
    )

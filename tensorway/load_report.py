"""What the Python client tells about the load of a model."""

from __future__ import annotations

from dataclasses import dataclass

from tensorway.v1 import mesh_pb2


@dataclass(frozen=True, slots=True)
class OrchestratorLoad:
    """The load of one model as one orchestrator sees it; rows are answers where the model generates."""

    orchestrator: str
    arrival_rows_per_s: float
    queue_s: float
    #: Share of the time that groups spend on this orchestrator's batches.
    utilisation: float
    predicted_replicas: float
    waiting_rows: int
    num_open: int
    #: What one replica serves in full batches, predicted; 0 while nothing was measured.
    replica_rows_per_s: float
    #: From the last request to when it said so.
    idle_s: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The load of one model, summed over orchestrators; rows are answers where the model generates."""

    model: str
    revision: str
    arrival_rows_per_s: float
    #: Mean wait for a group.
    queue_s: float
    #: Share of the time that the live groups compute.
    utilisation: float
    num_ready_replicas: int
    num_wanted_replicas: int
    #: Replicas that the load needs for the model's target; fractional, 0 while nothing was measured.
    predicted_replicas: float
    waiting_rows: int
    #: Requests not answered, waiting or running.
    num_open: int
    #: Both 0: only people choose the number of replicas.
    min_replicas: int
    max_replicas: int
    orchestrators: tuple[OrchestratorLoad, ...]

    @property
    def scales(self) -> bool:
        """Whether the mesh chooses the number of replicas."""
        return self.max_replicas > 0


def read_load(message: mesh_pb2.ModelLoad) -> LoadReport:
    """The report in a `tensorway.v1.ModelLoad`."""
    return LoadReport(
        message.model, message.revision, message.arrival_rows_per_second, message.queue_seconds, message.utilisation_ratio,
        message.num_ready_replicas, message.num_wanted_replicas, message.predicted_replicas, message.waiting_rows,
        message.num_open_requests, message.min_replicas, message.max_replicas,
        tuple(
            OrchestratorLoad(
                item.orchestrator, item.arrival_rows_per_second, item.queue_seconds, item.utilisation_ratio, item.predicted_replicas,
                item.waiting_rows, item.num_open_requests, item.replica_rows_per_second, item.idle_seconds,
            )
            for item in message.orchestrators
        ),
    )

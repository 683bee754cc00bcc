"""What each orchestrator tells about the load of its models: `loads/ORCHESTRATOR` in the registry, JSON in, JSON out.

A document counts for as long as its orchestrator is registered. Needs are in replicas and add up over orchestrators.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pydantic import TypeAdapter

#: Document key prefix: `loads/ORCHESTRATOR`.
LOADS: Final = "loads/"


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """The load of one model as one orchestrator sees it. For a model that generates, a row is one answer."""

    model: str
    revision: str
    #: Rows a second that came, smoothed over some ten seconds; refused ones count.
    arrival_rows_per_s: float
    #: The same, or the mean of the last two seconds where that is surely more.
    demand_rows_per_s: float
    #: Mean wait for a group of the requests answered lately, seconds.
    queue_s: float
    #: Groups that this orchestrator's batches keep busy, on average: 1.5 is one all the time and another half of it.
    busy_groups: float
    #: Live groups that it can reach.
    num_groups: int
    #: Rows a second that one replica serves in full batches, predicted; 0 while nothing was measured.
    replica_rows_per_s: float
    #: Rows that wait for a group.
    waiting_rows: int
    #: Requests that are not answered, waiting or running.
    num_open: int
    #: Replicas that this load needs; 0 while nothing was measured.
    predicted_replicas: float
    #: Seconds since the last request, or since the orchestrator first knew the model; 0 while any is open. As of writing.
    idle_s: float
    #: True: a request has come while no replica was wanted.
    is_called: bool

    @property
    def utilisation(self) -> float:
        """Share of the time that the groups spend on this orchestrator's batches; 0 where there is none."""
        return self.busy_groups / self.num_groups if self.num_groups else 0.0


_ADAPTER: Final[TypeAdapter[tuple[ModelLoad, ...]]] = TypeAdapter(tuple[ModelLoad, ...])


def load_key(orchestrator: str) -> str:
    """Key of an orchestrator's document."""
    return f"{LOADS}{orchestrator}"


def encode_loads(loads: Iterable[ModelLoad]) -> bytes:
    """The document of an orchestrator."""
    return _ADAPTER.dump_json(tuple(loads))


def decode_loads(document: bytes) -> tuple[ModelLoad, ...]:
    """Raises pydantic.ValidationError where the document holds no loads."""
    return _ADAPTER.validate_json(document)

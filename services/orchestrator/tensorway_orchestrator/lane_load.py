"""The load of a lane at one instant, of either kind."""

from __future__ import annotations

from tensorway.loads import ModelLoad
from tensorway_orchestrator.generation_lane import GenerationLane
from tensorway_orchestrator.lane import Lane
from tensorway_orchestrator.load import LaneView


def read_load(lane: Lane | GenerationLane, now_s: float) -> ModelLoad:
    """What the lane's meter says of what the lane holds now."""
    if isinstance(lane, GenerationLane):
        roster = lane.places.roster
        running = sum(len(record.in_flight) for record in roster)
        return lane.meter.read(LaneView(roster.num_live, lane.queue.num_waiting, running, lane.num_open, 0.0), now_s)
    forecast = lane.roster.forecast
    replica_rows_per_s = forecast.rows_per_s() / forecast.num_groups if forecast.num_groups else 0.0
    return lane.meter.read(LaneView(lane.roster.num_live, lane.queue.num_rows, 0, lane.num_open, replica_rows_per_s), now_s)

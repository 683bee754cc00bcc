"""Which waiting requests a batch takes, so that what it takes is answered in time and the group is not kept busy with little. Pure.

Most urgent first is the best order while everything can be in time, and the worst under overload: then the most urgent request is the one
that can hardly be answered any more, and serving it makes the next one late, too. So a batch leaves out what would be late, and becomes
smaller for its most urgent request only as far as smaller batches serve nearly as many rows a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from tensorway_orchestrator.batching import BatchLimits, rows_in_time
from tensorway_orchestrator.group_record import GroupRecord
from tensorway_orchestrator.requests import Request, RequestQueue

#: Share of the rows a second of full batches that a batch may go down to.
_WORTHWHILE: Final = 0.8


@dataclass(slots=True)
class Boarding:
    """What came out of the queue."""

    #: The batch; never empty.
    taken: list[Request] = field(default_factory=list)
    #: Would be answered after their deadlines. Where another attempt of theirs is under way, that one may still be in time.
    doomed: list[Request] = field(default_factory=list)


def board(queue: RequestQueue, head: Request, record: GroupRecord, limits: BatchLimits, now_s: float) -> Boarding:
    """The batch that `head` leads and `record`'s group gets now. `head` is open, and one of the queue's heads.

    Explanations, whose time is not that of a step, and what comes while nothing is measured, are never doomed. Where all would be late, the
    last one goes all the same: a group whose step times were learned in bad times must get the chance to show better ones.
    """
    if head.is_explanation:
        return Boarding(queue.take(head, limits.max_rows, limits.max_bytes, limits.max_requests))
    load = record.load()
    least_rows = load.step_times.least_worthwhile(limits.max_rows, _WORTHWHILE)
    boarding = Boarding()
    taken, doomed = boarding.taken, boarding.doomed
    # The first that can be in time says how small the batch should be; those before it would make it small for nothing.
    while not taken and (first := queue.take(head, 1, limits.max_bytes, 1)):
        rows = max(first[0].weight, min(least_rows, first[0].weight + queue.num_rows))
        (doomed if first[0].deadline_s < record.earliest_s(rows, now_s) else taken).extend(first)
    if not taken:
        taken.append(doomed.pop())
        return boarding
    max_rows = max(least_rows, rows_in_time(limits, taken[0], load, now_s))
    _fill(boarding, queue, head, record, replace(limits, max_rows=max_rows), now_s)
    return boarding


def _fill(boarding: Boarding, queue: RequestQueue, head: Request, record: GroupRecord, limits: BatchLimits, now_s: float) -> None:
    """Fills the batch up with what can be in time."""
    taken = boarding.taken
    due_s: float | None = None
    while (room := limits.max_rows - sum(request.weight for request in taken)) > 0 and len(taken) < limits.max_requests:
        left_bytes = limits.max_bytes - sum(request.num_bytes for request in taken)
        more = queue.take(head, room, left_bytes, limits.max_requests - len(taken))
        num_rows = sum(request.weight for request in more)
        if num_rows > room or sum(request.num_bytes for request in more) > left_bytes:
            for request in more:  # a single one that is too large for what is left
                queue.offer(request)
            return
        if due_s is None:
            due_s = record.earliest_s(limits.max_rows - room + num_rows, now_s)
        in_time = [request for request in more if request.deadline_s >= due_s]
        taken += in_time
        if len(in_time) == len(more):
            return  # the batch is full, or the queue has no more for it
        boarding.doomed += [request for request in more if request.deadline_s < due_s]

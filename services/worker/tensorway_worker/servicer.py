"""`NodeService`: what the groups of this node do, for a person with grpcurl and for `tensorway doctor`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Final

from tensorway.transport.port import Call, Server
from tensorway.v1 import node_pb2
from tensorway_worker.group_report import GroupReport, RankReport
from tensorway_worker.supervisor import BACKING_OFF

LIST_GROUPS: Final = "/tensorway.v1.NodeService/ListGroups"
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_STATES: Final = {
    "starting": node_pb2.GROUP_STATE_STARTING,
    "loading": node_pb2.GROUP_STATE_LOADING,
    "warming": node_pb2.GROUP_STATE_WARMING,
    "ready": node_pb2.GROUP_STATE_READY,
    BACKING_OFF: node_pb2.GROUP_STATE_BACKING_OFF,
    "stopping": node_pb2.GROUP_STATE_STOPPING,
}
_RANK_STATES: Final = {
    "starting": node_pb2.RANK_STATE_STARTING,
    "loading": node_pb2.RANK_STATE_LOADING,
    "warming": node_pb2.RANK_STATE_WARMING,
    "ready": node_pb2.RANK_STATE_READY,
    "stopping": node_pb2.RANK_STATE_STOPPING,
    "failed": node_pb2.RANK_STATE_FAILED,
}


class NodeServicer:
    """Answers from the supervisors' reports."""

    def __init__(self, node: str, reports: Callable[[], Iterable[GroupReport]]) -> None:
        self._node = node
        self._reports = reports

    def attach(self, server: Server) -> None:
        server.add_unary(LIST_GROUPS, self.list_groups)

    async def list_groups(self, _: bytes, __: Call) -> bytes:
        return node_pb2.ListGroupsResponse(groups=[_to_message(report, self._node) for report in self._reports()]).SerializeToString()


def _to_message(report: GroupReport, node: str) -> node_pb2.Group:
    ranks = [_rank_message(rank, node) for rank in report.ranks]
    leader = report.ranks[0] if report.ranks else RankReport(0, node)
    return node_pb2.Group(
        id=report.id, model=report.replica.model, revision=report.replica.revision, epoch=report.epoch,
        state=_STATES.get(report.state, node_pb2.GROUP_STATE_UNSPECIFIED), reason=report.reason, endpoint=report.endpoint,
        pids=[rank.pid for rank in ranks], memory_bytes=sum(rank.memory_bytes for rank in ranks), ranks=ranks, detail=report.detail,
        num_running_answers=leader.num_running_answers, num_waiting_answers=leader.num_waiting_answers,
        num_free_blocks=leader.num_free_blocks,
    )


def _rank_message(rank: RankReport, node: str) -> node_pb2.Rank:
    # A rank that has not said yet what it uses can be looked up, on its own node.
    memory_bytes = rank.memory_bytes or (_resident_bytes(rank.pid) if rank.node == node else 0)
    return node_pb2.Rank(
        rank=rank.rank, node=rank.node, pid=rank.pid, device=rank.device,
        state=_RANK_STATES.get(rank.state, node_pb2.RANK_STATE_UNSPECIFIED), detail=rank.detail,
        fraction=rank.fraction if rank.fraction >= 0 else None, num_steps=rank.num_steps, weights_bytes=rank.weights_bytes,
        memory_bytes=memory_bytes, memory_limit_bytes=rank.memory_limit_bytes, busy_share=rank.busy_share,
    )


def _resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 once it has ended."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0

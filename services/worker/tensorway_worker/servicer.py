"""`NodeService`: what the groups of this node do, for a person with grpcurl and for `tensorway doctor`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Final

from tensorway.transport.port import Call, Server
from tensorway.v1 import node_pb2
from tensorway_worker.supervisor import BACKING_OFF, GroupReport

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


class NodeServicer:
    """Answers from the supervisors' reports."""

    def __init__(self, reports: Callable[[], Iterable[GroupReport]]) -> None:
        self._reports = reports

    def attach(self, server: Server) -> None:
        server.add_unary(LIST_GROUPS, self.list_groups)

    async def list_groups(self, _: bytes, __: Call) -> bytes:
        return node_pb2.ListGroupsResponse(groups=[_to_message(report) for report in self._reports()]).SerializeToString()


def _to_message(report: GroupReport) -> node_pb2.Group:
    return node_pb2.Group(
        id=report.id, model=report.replica.model, revision=report.replica.revision, epoch=report.epoch,
        state=_STATES.get(report.state, node_pb2.GROUP_STATE_UNSPECIFIED), reason=report.reason, endpoint=report.endpoint,
        pids=report.pids, memory_bytes=sum(map(_resident_bytes, report.pids)),
    )


def _resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 once it has ended."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0

"""Closing the door behind a group that has met: neither TensorPipe nor gloo can tell a rank from a stranger who connects.

Both keep their listening sockets for as long as they live, although no rank connects again. A socket that is shut down makes their event
loops spin, so the descriptor is given another file instead: the kernel closes the listening socket and forgets to watch it, and the
library keeps a descriptor that stays silent.

Whoever connected before that is found out: every rank tells the others its own ends of its connections, and an accepted connection whose
other end belongs to none of them is a stranger's.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch.distributed.distributed_c10d import Store

from tensorway_worker.rank.group_port import GroupLost

#: States in /proc/net/tcp (Linux, include/net/tcp_states.h).
_ESTABLISHED: Final = "01"
_LISTEN: Final = "0A"


@dataclass(frozen=True, slots=True)
class _Socket:
    """One TCP socket of this process; its ends are `ADDRESS:PORT` as the kernel writes them."""

    descriptor: int
    inode: str
    state: str
    local: str
    remote: str


class Door:
    """The TCP sockets that this process opens for listening from the construction on."""

    def __init__(self) -> None:
        self._before = {one.inode for one in _sockets() if one.state == _LISTEN}
        self._ports: set[str] = set()

    def close(self) -> int:
        """Closes all that were opened since; returns how many. Connections that are established stay."""
        opened = [one for one in _sockets() if one.state == _LISTEN and one.inode not in self._before]
        for one in opened:
            with socket.socket() as silent:
                os.dup2(silent.fileno(), one.descriptor, inheritable=False)
        self._ports = {_port(one.local) for one in opened}
        return len(opened)

    def own_ends(self) -> set[str]:
        """This process's ends of all its connections."""
        return {one.local for one in _sockets() if one.state == _ESTABLISHED}

    def strangers(self, known: set[str]) -> set[str]:
        """The other ends of connections that came in by this door and are not `known`."""
        came_in = {one.remote for one in _sockets() if one.state == _ESTABLISHED and _port(one.local) in self._ports}
        return came_in - known


def refuse_strangers(door: Door, store: Store, rank: int, world_size: int, epoch: int) -> None:
    """Raises GroupLost where somebody else has connected before the door was closed: he could stay for as long as this epoch lives."""
    others = [other for other in range(world_size) if other != rank]
    store.set(f"ends/{rank}", json.dumps(sorted(door.own_ends())))
    known = {end for other in others for end in json.loads(store.get(f"ends/{other}"))}
    if strangers := door.strangers(known):
        raise GroupLost(f"{len(strangers)} connections that are no rank's were open to rank {rank} of epoch {epoch}")


def _port(end: str) -> str:
    return end.rpartition(":")[2]


def _sockets() -> list[_Socket]:
    """Every TCP socket of this process."""
    rows: dict[str, list[str]] = {}
    for table in ("tcp", "tcp6"):
        path = Path(f"/proc/self/net/{table}")
        if path.exists():  # a kernel without IPv6 has one only
            rows |= {row[9]: row for row in (line.split() for line in path.read_text(encoding="ascii").splitlines()[1:])}
    found: list[_Socket] = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue  # the descriptor of this very listing
        inode = target.removeprefix("socket:[").removesuffix("]")
        row = rows.get(inode)
        if target.startswith("socket:[") and row is not None:
            found.append(_Socket(int(entry), inode, row[3], row[1], row[2]))
    return found

"""A rank's pipes to its node: orders and the store's answers come in on standard input, and its end means that the
node is gone; statuses go out."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from typing import Final

from tensorway.errors import FailedPrecondition
from tensorway_worker.rank.launch import STATUS_FD_VARIABLE, RankLaunch, RankStatus

_LOG = logging.getLogger(__name__)

_MAX_LAUNCH_BYTES: Final = 1 << 20
_READ_BYTES: Final = 65_536


def read_launch(descriptor: int) -> RankLaunch:
    """The first line of the node's pipe. Raises FailedPrecondition where it is no RankLaunch."""
    line = bytearray()
    while not line.endswith(b"\n"):
        read = os.read(descriptor, _READ_BYTES)
        line += read
        if not read or len(line) > _MAX_LAUNCH_BYTES:
            break
    try:
        return RankLaunch.from_json(line.decode())
    except (ValueError, TypeError) as error:
        raise FailedPrecondition(f"standard input must hold one line of JSON, a RankLaunch: {error}") from error


def watch_node(
    loop: asyncio.AbstractEventLoop, descriptor: int, on_end: Callable[[], None], on_line: Callable[[bytes], None] | None = None
) -> None:
    """Calls `on_line` in the loop for each line that follows the launch (an answer of the store), and `on_end` once the pipe ends."""
    rest = bytearray()

    def readable() -> None:
        read = os.read(descriptor, _READ_BYTES)
        if not read:
            loop.remove_reader(descriptor)
            on_end()
            return
        rest.extend(read)
        *lines, last = rest.split(b"\n") if b"\n" in read else (rest,)
        if lines:
            rest[:] = last
            for line in lines:
                if on_line is not None:
                    on_line(bytes(line))

    loop.add_reader(descriptor, readable)


class StatusPipe:
    """Writes `RankStatus` lines. Without a status descriptor in the environment (a rank started by hand) they go to the log."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        number = environment.get(STATUS_FD_VARIABLE)
        self._descriptor = int(number) if number else -1
        if number:
            # A node that does not read must not stop the rank's loop.
            os.set_blocking(self._descriptor, False)

    def write(self, status: RankStatus) -> None:
        """Writes one line; one that does not fit into the pipe is dropped, for the next heartbeat tells the same. A node that has gone
        shows as the end of standard input."""
        if self._descriptor < 0:
            _LOG.debug("status", extra={"fields": {"state": status.state, "detail": status.detail}})
            return
        try:
            os.write(self._descriptor, status.to_json().encode() + b"\n")
        except BlockingIOError:
            _LOG.warning("the node does not read its status pipe; a status was dropped")
        except BrokenPipeError:
            _LOG.warning("the node has closed its status pipe")
            self._descriptor = -1

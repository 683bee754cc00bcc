"""`python -m tensorway_worker.rank`: one rank process, started by a node (see launch.py for what passes between them)."""

from __future__ import annotations

import os
import signal
import sys

from tensorway.process import die_with_parent
from tensorway_worker.rank.node_pipe import read_launch


def main() -> int:
    """Runs the rank; returns its exit status."""
    # Before anything slow: a rank must never outlive its node with a device in its hands.
    die_with_parent(signal.SIGKILL)
    launch = read_launch(sys.stdin.fileno())
    from tensorway.telemetry.logs import configure_logs

    fields = {"group": launch.group, "model": launch.model, "epoch": launch.epoch, "rank": launch.rank}
    configure_logs("rank", launch.group, launch.log_level, launch.log_format, fields=fields)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, launch.threads)))
    import uvloop

    from tensorway_worker.rank.lifecycle import Rank

    return uvloop.run(Rank(launch).run(os.environ, sys.stdin.fileno()))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A hung step must not hold up the exit: its thread is a daemon, but the interpreter's and torch's own clean-up would wait for it.
    os._exit(status)

"""`python -m tensorway_worker`: starts one node."""

from __future__ import annotations

import sys

from tensorway.config import load_settings
from tensorway.service import run_service
from tensorway_worker.node import Node
from tensorway_worker.settings import NodeSettings


def main() -> int:
    settings = load_settings(NodeSettings, sys.argv[1:], "tensorway worker")
    return run_service(Node(settings), settings)


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m tensorway_orchestrator`: starts one orchestrator."""

from __future__ import annotations

import sys

from tensorway.config import load_settings
from tensorway.service import run_service
from tensorway_orchestrator.service import Orchestrator
from tensorway_orchestrator.settings import OrchestratorSettings


def main() -> int:
    settings = load_settings(OrchestratorSettings, sys.argv[1:], "tensorway orchestrator")
    return run_service(Orchestrator(settings), settings)


if __name__ == "__main__":
    raise SystemExit(main())

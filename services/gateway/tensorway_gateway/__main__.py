"""`python -m tensorway_gateway`: starts one gateway."""

from __future__ import annotations

import sys

from tensorway.config import load_settings
from tensorway.service import run_service
from tensorway_gateway.service import Gateway
from tensorway_gateway.settings import GatewaySettings


def main() -> int:
    settings = load_settings(GatewaySettings, sys.argv[1:], "tensorway gateway")
    gateway = Gateway(settings)
    return run_service(gateway, settings, gateway.guard)


if __name__ == "__main__":
    raise SystemExit(main())

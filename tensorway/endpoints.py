"""Endpoints: `host:port` or `unix:path`, as they are bound and as others dial them."""

from __future__ import annotations

import socket
from typing import Final

#: Hosts that mean every interface.
WILDCARDS: Final = ("0.0.0.0", "[::]", "::", "*")


def dialable(endpoint: str, advertise_host: str) -> str:
    """The endpoint that others dial for one that is bound here: `advertise_host` where one is given, this machine's name for a wildcard."""
    if endpoint.startswith("unix:"):
        return endpoint
    host, _, port = endpoint.rpartition(":")
    if advertise_host:
        host = advertise_host
    elif host in WILDCARDS:
        host = socket.gethostname()
    return f"{host}:{port}"

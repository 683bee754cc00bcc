"""Asks a URL and says by its exit status whether the answer was 2xx: the health check of container images, which hold no curl.

    python -m tensorway.probe http://127.0.0.1:8002/readyz

Only the standard library is used, and little of it: the probe runs every few seconds. An `https:` URL is asked without checking the
certificate, for the probe talks to its own container; where the ops port wants a client's certificate (`ops_tls: mtls`), it shows the
service's own, named by TENSORWAY_TLS_CERT and TENSORWAY_TLS_KEY.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request
from typing import Final

_TIMEOUT_S: Final = 2.0


def probe(url: str) -> str:
    """What is wrong; empty where the answer was 2xx."""
    context = None
    if url.startswith("https:"):
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if cert := os.environ.get("TENSORWAY_TLS_CERT"):
            context.load_cert_chain(cert, os.environ.get("TENSORWAY_TLS_KEY"))
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S, context=context):
            return ""
    except urllib.error.HTTPError as error:
        return f"{url} answered {error.code}: {error.read(500).decode('utf-8', 'replace').strip()}"
    except (OSError, ValueError) as error:
        return f"{url}: {error}"


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    if len(argv) != 1:
        print("usage: python -m tensorway.probe URL", file=sys.stderr)
        return 2
    problem = probe(argv[0])
    print(problem or "ok")
    return 1 if problem else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

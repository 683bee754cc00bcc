"""py-consul's asyncio client for one agent, told everything and bounded."""

from __future__ import annotations

import ssl
from typing import Any, Final

import aiohttp
import consul.aio  # type: ignore[import-untyped]

from tensorway.registry.consul_url import Address, ConsulUrl

_CONNECT_S: Final = 2.0


class _Http(consul.aio.HTTPClient):  # type: ignore[misc]
    """py-consul's transport over a session of our own: only the given CA is trusted, any number of blocking queries, bounded connecting."""

    def __init__(self, base_uri: str, tls: ssl.SSLContext | None) -> None:
        self.base_uri = base_uri
        connector = aiohttp.TCPConnector(limit=0, ssl=tls or True)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
        )

    def _request(self, *args: Any, **kwargs: Any) -> Any:
        if self._session.closed:
            raise aiohttp.ClientConnectionError("another agent is used now")
        return super()._request(*args, **kwargs)


class AgentClient(consul.aio.Consul):  # type: ignore[misc]
    """py-consul's client for one agent, told everything: left to itself it reads the environment."""

    def __init__(self, url: ConsulUrl, address: Address, tls: ssl.SSLContext | None, token: str) -> None:
        self._tls = tls
        super().__init__(str(address), address.port, scheme=url.scheme, dc=url.dc or None, verify=True)
        self.token = token or None  # CONSUL_HTTP_TOKEN would have gone before

    def http_connect(self, host: str, port: int, scheme: str, verify: object = True, cert: object = None) -> _Http:
        return _Http(f"{scheme}://{host}", self._tls)


def is_refusal(error: BaseException) -> bool:
    """Whether TLS failed because of a certificate, ours or theirs: trying again does not help."""
    causes = (error, error.__cause__, getattr(error, "certificate_error", None))
    return any(
        isinstance(cause, ssl.SSLCertVerificationError) or (isinstance(cause, ssl.SSLError) and "ALERT" in (cause.reason or ""))
        for cause in causes
    )

"""The ops HTTP port: `/healthz` (the process lives), `/readyz` (it can do its job, downstream included), `/metrics` (Prometheus text), and
what pages a service adds."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from tensorway.errors import Unavailable

#: Returns None while ready, otherwise one sentence that says why not.
Readiness = Callable[[], str | None]


@dataclass(frozen=True, slots=True)
class Page:
    """An answer to GET."""

    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


#: Makes a page when somebody asks for it; runs in the loop.
PageSource = Callable[[], Awaitable[Page]]


class OpsServer:
    """Serves the ops port; `endpoint` is the bound one after `start`."""

    def __init__(
        self, listen: str, readiness: Readiness, metrics: CollectorRegistry, tls: ssl.SSLContext | None = None,
        pages: Mapping[str, PageSource] | None = None,
    ) -> None:
        """`pages` are further ones, by path."""
        self._pages = pages or {}
        self._tls = tls
        self._listen = listen
        self._readiness = readiness
        self._metrics = metrics
        self._runner: web.AppRunner | None = None
        self.endpoint = ""

    async def start(self) -> None:
        """Raises Unavailable naming the endpoint where it cannot bind."""
        app = web.Application()
        app.add_routes([
            web.get("/healthz", self._healthz),
            web.get("/readyz", self._readyz),
            web.get("/metrics", self._render_metrics),
            *(web.get(path, _handler_of(source)) for path, source in self._pages.items()),
        ])
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        host, _, port = self._listen.rpartition(":")
        try:
            await web.TCPSite(self._runner, host.strip("[]") or None, int(port), ssl_context=self._tls).start()
        except (OSError, ValueError) as error:
            await self._runner.cleanup()
            raise Unavailable(f"ops_listen {self._listen!r} cannot be bound: {error}", field="ops_listen") from error
        bound = self._runner.addresses[0]
        self.endpoint = f"{host or '0.0.0.0'}:{bound[1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        reason = self._readiness()
        return web.Response(text="ready\n") if reason is None else web.Response(text=f"{reason}\n", status=503)

    async def _render_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._metrics), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _handler_of(source: PageSource) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(_: web.Request) -> web.Response:
        page = await source()
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **page.headers}
        return web.Response(body=page.body, content_type=page.content_type, charset="utf-8", headers=headers)

    return answer

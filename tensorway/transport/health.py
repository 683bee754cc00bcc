"""grpc.health.v1 over the Server port: Check, and Watch, which streams every change."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from google.protobuf.message import DecodeError
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from tensorway.errors import InvalidRequest, NotFound
from tensorway.transport.port import Call, Server, Stream

#: A name that is SERVING for as long as the process lives, whether it is ready or not: what a registry asks for, and a liveness probe.
LIVENESS: Final = "tensorway.liveness"
_CHECK: Final = "/grpc.health.v1.Health/Check"
_WATCH: Final = "/grpc.health.v1.Health/Watch"


class HealthService:
    """The health of named services; "" is the whole server. All start as NOT_SERVING, but for `LIVENESS`. Lives in one loop."""

    def __init__(self, service_names: Iterable[str] = ()) -> None:
        self._is_serving = {**dict.fromkeys(("", *service_names), False), LIVENESS: True}
        self._watchers: set[asyncio.Event] = set()
        self._has_shut_down = False

    def attach(self, server: Server) -> None:
        """Adds Check and Watch to a server that has not started."""
        server.add_unary(_CHECK, self._check)
        server.add_stream(_WATCH, self._watch)

    def set(self, service_name: str, serving: bool) -> None:
        """Says whether a service serves, and tells its watchers. Ignored after `shutdown`."""
        if not self._has_shut_down and self._is_serving.get(service_name) is not serving:
            self._is_serving[service_name] = serving
            self._wake()

    def shutdown(self) -> None:
        """Everything is NOT_SERVING from now on; each watcher reads that as the last message of its stream. Call it before the server
        stops, which otherwise waits for the watchers."""
        self._is_serving = dict.fromkeys(self._is_serving, False)
        self._has_shut_down = True
        self._wake()

    async def _check(self, request: bytes, call: Call) -> bytes:
        name = _service_of(request)
        if name not in self._is_serving:
            raise NotFound(f"health of {name!r} is not known here", field="service")
        return self._response(name)

    async def _watch(self, stream: Stream) -> None:
        request = await stream.read()
        if request is None:
            raise InvalidRequest("Watch needs one request message")
        name = _service_of(request)
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            told = b""
            while True:
                response = self._response(name)
                if response != told:
                    told = response
                    await stream.write(response)
                # The status may have changed while the message left: look again before the end is taken for the end.
                if self._response(name) == told:
                    if self._has_shut_down:
                        return
                    await changed.wait()
                changed.clear()
        finally:
            self._watchers.discard(changed)

    def _response(self, name: str) -> bytes:
        is_serving = self._is_serving.get(name)
        if is_serving is None:
            status = HealthCheckResponse.SERVICE_UNKNOWN
        else:
            status = HealthCheckResponse.SERVING if is_serving else HealthCheckResponse.NOT_SERVING
        response: bytes = HealthCheckResponse(status=status).SerializeToString()
        return response

    def _wake(self) -> None:
        for changed in self._watchers:
            changed.set()


def _service_of(request: bytes) -> str:
    try:
        name: str = HealthCheckRequest.FromString(request).service
    except DecodeError as error:
        raise InvalidRequest(f"not a HealthCheckRequest: {error}") from error
    return name

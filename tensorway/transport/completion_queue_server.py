"""The fast server: grpc core's completion queue, polled by one thread, behind the Server port.

It uses `grpc._cython.cygrpc`, which is private to grpcio: the version is pinned exactly, and the same conformance suite runs on this
server and on the portable one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any, Final

from grpc._cython import cygrpc

from tensorway.errors import FailedPrecondition
from tensorway.transport.completion_queue import CompletionQueuePoller, Rest
from tensorway.transport.credentials import core_server_credentials
from tensorway.transport.listening import UNWIND_S, Routes, bound_endpoint, cannot_bind, check_free, choices, server_arguments
from tensorway.transport.port import ServerOptions, StreamHandler, UnaryHandler
from tensorway.transport.server_call import ServerCall, UnaryCall, reject
from tensorway.transport.server_stream import StreamCall

_LOG = logging.getLogger(__name__)

#: RPCs that core may hand over between two turns of the polling thread.
_NUM_REQUESTED: Final = 32


class CompletionQueueServer:
    """See `tensorway.transport.port.Server`."""

    def __init__(self, options: ServerOptions) -> None:
        self.options: Final = options
        self.running: Final[set[ServerCall]] = set()
        self.loop: asyncio.AbstractEventLoop
        self._routes = Routes(options.tls)
        # The same by method name as core spells it; filled at start.
        self._unary: dict[bytes, UnaryHandler] = {}
        self._streams: dict[bytes, StreamHandler] = {}
        self._poller: CompletionQueuePoller | None = None
        self._server: Any = None
        # Core must not be asked for a call once its shutdown began, and the two happen in different threads.
        self._lock = threading.Lock()
        self._shut_down: asyncio.Future[None] | None = None
        #: Set while stop waits for handlers to unwind.
        self._unwound: asyncio.Event | None = None

    def add_unary(self, method: str, handler: UnaryHandler) -> None:
        """Serves `method` with `handler`; see `Routes`."""
        self._routes.add_unary(method, handler)

    def add_stream(self, method: str, handler: StreamHandler) -> None:
        """Serves `method` with `handler`; see `Routes`."""
        self._routes.add_stream(method, handler)

    @property
    def num_in_flight(self) -> int:
        return len(self.running)

    def forget(self, call: ServerCall) -> None:
        """Called by a call whose handler ended."""
        self.running.discard(call)
        if self._unwound is not None and not self.running:
            self._unwound.set()

    def hold_events(self) -> None:
        """Called by a call that starts a batch whose end nobody waits for."""
        if self._poller is not None:
            self._poller.hold()

    async def start(self) -> str:
        """See the port."""
        if self._server is not None or self._shut_down is not None:
            raise FailedPrecondition("this server was started before")
        endpoints = choices(self.options.endpoint)
        check_free(endpoints[0])
        self.loop = asyncio.get_running_loop()
        poller = CompletionQueuePoller("tensorway-server")
        server = cygrpc.Server(server_arguments(self.options), False)
        server.register_completion_queue(poller.queue)
        tls = self.options.tls
        credentials = () if tls is None else (core_server_credentials(tls),)
        for endpoint in endpoints:
            if port := server.add_http2_port(endpoint.encode(), *credentials):
                break
        else:
            server.destroy()
            await poller.stop()
            raise cannot_bind(self.options.endpoint, "it is in use, not permitted, or not an address of this machine")
        self._unary = {method.encode(): handler for method, handler in self._routes.unary.items()}
        self._streams = {method.encode(): handler for method, handler in self._routes.streams.items()}
        server.start()
        self._poller, self._server = poller, server
        for _ in range(_NUM_REQUESTED):
            self._request_call(poller.queue)
        poller.start()
        return bound_endpoint(endpoint, port)

    async def stop(self, grace_s: float) -> None:
        """See the port."""
        server, poller = self._server, self._poller
        if server is None or poller is None:
            return
        if self._shut_down is None:
            self._shut_down = self.loop.create_future()
            with self._lock:
                server.shutdown(poller.queue, self._shut_down_event)
        await asyncio.wait((self._shut_down,), timeout=max(0.0, grace_s))
        if not self._shut_down.done():
            await self._cancel_running()
            server.cancel_all_calls()
            await asyncio.wait((self._shut_down,), timeout=UNWIND_S)
        if self._server is None:
            return
        self._server = self._poller = None
        if not self._shut_down.done():
            _LOG.error("grpc core did not let go of every RPC; the polling thread stays behind")
            return
        server.destroy()
        await poller.stop()

    async def _cancel_running(self) -> None:
        """Cancels every handler, so that its client reads why, and waits until they have unwound."""
        if not self.running:
            return
        self._unwound = asyncio.Event()
        for call in tuple(self.running):
            call.cancel_at_stop()
        try:
            await asyncio.wait_for(self._unwound.wait(), UNWIND_S)
        except TimeoutError:
            methods = sorted({call.method for call in self.running})
            _LOG.error("handlers still run %.0f s after they were cancelled: %s", UNWIND_S, ", ".join(methods))

    def _request_call(self, queue: Any) -> None:
        with self._lock:
            if self._shut_down is None:
                self._server.request_call(queue, queue, self._arrived)

    def _arrived(self, event: Any) -> Rest | None:
        """In the polling thread: a new RPC, or the word that none will come."""
        if not event.success or self._poller is None:
            return None
        self._request_call(self._poller.queue)
        method = event.call_details.method
        unary = self._unary.get(method)
        if unary is not None:
            UnaryCall(self, event, unary).arm()
            return None
        stream = self._streams.get(method)
        if stream is not None:
            return StreamCall(self, event, stream).arm()
        reject(event.call, self._routes.unknown(method.decode("utf-8", "replace")))
        return None

    def _shut_down_event(self, event: Any) -> Rest:
        return self._on_shut_down

    def _on_shut_down(self) -> None:
        if self._shut_down is not None and not self._shut_down.done():
            self._shut_down.set_result(None)

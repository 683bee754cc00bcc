"""The portable server: grpc.aio's public API behind the Server port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, Final, NoReturn, TypeVar

import grpc

from tensorway.errors import FailedPrecondition, InternalError, TensorwayError
from tensorway.transport.aio_call import AioCall, AioStream
from tensorway.transport.credentials import server_credentials
from tensorway.transport.listening import (
    UNWIND_S,
    Routes,
    bound_endpoint,
    cannot_bind,
    check_free,
    choices,
    full,
    is_full,
    no_request,
    server_arguments,
    stopped,
    too_large,
)
from tensorway.transport.port import ServerOptions, StreamHandler, UnaryHandler
from tensorway.transport.rich_status import DETAILS_TRAILER, encode_error

_LOG = logging.getLogger(__name__)

_CODES: Final[dict[int, grpc.StatusCode]] = {code.value[0]: code for code in grpc.StatusCode}

_Reply = TypeVar("_Reply")


class AioServer:
    """See `tensorway.transport.port.Server`."""

    def __init__(self, options: ServerOptions) -> None:
        self.options: Final = options
        self.routes: Final = Routes(options.tls)
        self._server: Any = None
        self._running: set[AioCall] = set()
        self._was_started = False
        #: Set while stop waits for handlers to unwind.
        self._unwound: asyncio.Event | None = None

    def add_unary(self, method: str, handler: UnaryHandler) -> None:
        """Serves `method` with `handler`; see `Routes`."""
        self.routes.add_unary(method, handler)

    def add_stream(self, method: str, handler: StreamHandler) -> None:
        """Serves `method` with `handler`; see `Routes`."""
        self.routes.add_stream(method, handler)

    @property
    def num_in_flight(self) -> int:
        return len(self._running)

    async def start(self) -> str:
        """See the port."""
        if self._was_started:
            raise FailedPrecondition("this server was started before")
        endpoints = choices(self.options.endpoint)
        check_free(endpoints[0])
        server = grpc.aio.server(options=server_arguments(self.options))
        server.add_generic_rpc_handlers((_Handlers(self),))
        for endpoint in endpoints:
            try:
                port = self._bind(server, endpoint)
                break
            except RuntimeError:
                _LOG.debug("%s cannot be bound", endpoint)
        else:
            await server.stop(None)
            raise cannot_bind(self.options.endpoint, "it is in use, not permitted, or not an address of this machine")
        await server.start()
        self._server, self._was_started = server, True
        return bound_endpoint(endpoint, port)

    def _bind(self, server: Any, endpoint: str) -> int:
        tls = self.options.tls
        port: int = server.add_insecure_port(endpoint) if tls is None else server.add_secure_port(endpoint, server_credentials(tls))
        return port

    async def stop(self, grace_s: float) -> None:
        """See the port."""
        server, self._server = self._server, None
        if server is None:
            return
        # grpc's own grace is longer than ours, so that handlers are cancelled by us and their clients read why.
        stopping = asyncio.ensure_future(server.stop(max(0.0, grace_s) + UNWIND_S))
        await asyncio.wait((stopping,), timeout=max(0.0, grace_s))
        if self._running:
            await self._cancel_running()
        await stopping

    async def _cancel_running(self) -> None:
        self._unwound = asyncio.Event()
        for call in tuple(self._running):
            call.cancel_at_stop()
        try:
            await asyncio.wait_for(self._unwound.wait(), UNWIND_S)
        except TimeoutError:
            methods = sorted({call.method for call in self._running})
            _LOG.error("handlers still run %.0f s after they were cancelled: %s", UNWIND_S, ", ".join(methods))

    async def run_unary(self, handler: UnaryHandler, context: Any, method: str) -> bytes:
        """Runs one unary RPC to its reply or its status."""
        call = AioCall(context, method)
        return await self._guard(call, self._answer(handler, call))

    async def run_stream(self, handler: StreamHandler, context: Any, method: str) -> None:
        """Runs one streaming RPC to its status."""
        stream = AioStream(context, method, self.options)
        await self._guard(stream, _run(handler, stream))

    async def reject(self, context: Any, method: str) -> NoReturn:
        """Ends an RPC whose method has no handler."""
        await _abort(context, (), self.routes.unknown(method))

    async def _answer(self, handler: UnaryHandler, call: AioCall) -> bytes:
        request = await call.read()
        if request is None:
            raise no_request(call.method)
        reply = await handler(request, call)
        if len(reply) > self.options.max_message_bytes:
            raise too_large(len(reply), self.options)
        return reply

    async def _guard(self, call: AioCall, work: Coroutine[Any, Any, _Reply]) -> _Reply:
        """Awaits `work` as one of the RPCs in flight; turns what it raises into the RPC's status."""
        if is_full(self.options, len(self._running)):
            work.close()
            await _abort(call.context, (), full(self.options))
        self._running.add(call)
        try:
            return await work
        except asyncio.CancelledError:
            call.run_callbacks()
            if not call.is_stopped:
                raise
            error: TensorwayError = stopped()
        except TensorwayError as raised:
            error = raised
        except Exception as raised:  # noqa: BLE001 - becomes the RPC's status
            _LOG.error("%s: the handler raised %s", call.method, type(raised).__name__, exc_info=raised)
            error = InternalError(f"{type(raised).__name__}: {raised}")
        finally:
            self._running.discard(call)
            if self._unwound is not None and not self._running:
                self._unwound.set()
        return await _abort(call.context, call.trailers, error)


class _Handlers(grpc.GenericRpcHandler):
    """Finds the handler of a method. grpc asks once per RPC."""

    def __init__(self, server: AioServer) -> None:
        self._server = server

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        server, method = self._server, handler_call_details.method
        unary = server.routes.unary.get(method)
        if unary is not None:

            async def run_unary(_: object, context: Any) -> bytes:
                return await server.run_unary(unary, context, method)

            # Read by our own hand: grpc.aio's unary handlers never answer a client that closes its side without a message.
            return grpc.stream_unary_rpc_method_handler(run_unary)
        stream = server.routes.streams.get(method)

        async def run_stream(_: object, context: Any) -> None:
            if stream is None:
                await server.reject(context, method)
            else:
                await server.run_stream(stream, context, method)

        return grpc.stream_stream_rpc_method_handler(run_stream)


async def _run(handler: StreamHandler, stream: AioStream) -> None:
    running: Awaitable[None] = handler(stream)
    await running


async def _abort(context: Any, trailers: Sequence[tuple[str, str | bytes]], error: TensorwayError) -> NoReturn:
    code, sentence, details = encode_error(error)
    await context.abort(_CODES[code], sentence, (*trailers, (DETAILS_TRAILER, details)))
    raise AssertionError("grpc's abort returned")

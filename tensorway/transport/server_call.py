"""One RPC of the completion-queue server.

The polling thread arms a call and takes its messages out of core; everything else happens in the loop. A unary reply leaves as one batch:
initial metadata, message and status.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from grpc._cython import cygrpc

from tensorway.deadline import Deadline
from tensorway.errors import InternalError, TensorwayError
from tensorway.transport.callbacks import call_guarded
from tensorway.transport.completion_queue import Rest, forget
from tensorway.transport.credentials import core_peer_names
from tensorway.transport.listening import full, is_full, no_request, stopped, too_large
from tensorway.transport.port import ServerOptions, UnaryHandler
from tensorway.transport.rich_status import DETAILS_TRAILER, encode_error

_LOG = logging.getLogger(__name__)

Trailers = tuple[tuple[str, str | bytes], ...]

_NO_FLAGS: Final = 0
OK: Final = 0
#: Core writes "no deadline" as an instant beyond this one, in seconds since 1970.
_NEVER_S: Final = 1e12


def reject(call: Any, error: TensorwayError) -> None:
    """Ends an RPC that never began."""
    code, sentence, details = encode_error(error)
    call.start_server_batch(
        (
            cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS),
            cygrpc.SendStatusFromServerOperation(((DETAILS_TRAILER, details),), code, sentence.encode(), _NO_FLAGS),
            cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),
        ),
        forget,
    )


class CallOwner(Protocol):
    """What a call needs of its server."""

    loop: asyncio.AbstractEventLoop

    @property
    def options(self) -> ServerOptions: ...

    @property
    def running(self) -> set[ServerCall]:
        """Calls whose handler runs. The server awaits them when it stops."""

    def forget(self, call: ServerCall) -> None: ...

    def hold_events(self) -> None:
        """In the loop: batches are about to be started, whose events may come together."""


class ServerCall:
    """What unary and streaming calls share. See `tensorway.transport.port.Call`."""

    __slots__ = (
        "_call", "_callbacks", "_event", "_has_answered", "_has_initial_metadata", "_is_cancelled", "_metadata",
        "_owner", "_task", "_trailers",
    )  # fmt: skip

    def __init__(self, owner: CallOwner, event: Any) -> None:
        self._owner = owner
        self._call = event.call
        self._event = event
        self._trailers: Trailers = ()
        self._callbacks: list[Callable[[], None]] | None = None
        self._metadata: dict[str, str | bytes] | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_cancelled = False
        self._has_answered = False
        self._has_initial_metadata = False

    @property
    def method(self) -> str:
        method: bytes = self._event.call_details.method
        return method.decode("utf-8", "replace")

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        if self._metadata is None:
            self._metadata = dict(self._event.invocation_metadata)
        return self._metadata

    @property
    def deadline(self) -> Deadline | None:
        at_s: float = self._event.call_details.deadline
        return None if at_s > _NEVER_S else Deadline.after(at_s - time.time())

    @property
    def peer(self) -> str:
        peer: bytes = self._call.peer()
        return peer.decode("utf-8", "replace")

    @property
    def peer_names(self) -> tuple[str, ...]:
        return core_peer_names(self._call)

    def set_trailers(self, trailers: Sequence[tuple[str, str | bytes]]) -> None:
        self._trailers = tuple(trailers)

    def on_cancel(self, callback: Callable[[], None]) -> None:
        if self._is_cancelled:
            self._owner.loop.call_soon(callback)
        elif self._callbacks is None:
            self._callbacks = [callback]
        else:
            self._callbacks.append(callback)

    def arm_close(self) -> None:
        """In the polling thread: asks core to say when the client goes away."""
        self._start((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), self._closed)

    def _start(self, operations: Sequence[Any], tag: Callable[[Any], Rest | None]) -> None:
        result = self._call.start_server_batch(operations, tag)
        if result != OK:
            raise InternalError(f"{self.method}: grpc core refused a batch with call error {result}")

    def _closed(self, event: Any) -> Rest | None:
        """In the polling thread: the RPC is over; only a cancellation concerns the loop."""
        return self._cancel if event.batch_operations[0].cancelled() else None

    def cancel_at_stop(self) -> None:
        """In the loop: the server stops. Unlike a client that went away, this one still reads a status."""
        self._run_callbacks()
        if self._task is not None:
            self._task.cancel()

    def _cancel(self) -> None:
        if self._has_answered or self._is_cancelled:
            return
        self._is_cancelled = True
        self._run_callbacks()
        if self._task is not None:
            self._task.cancel()

    def _run_callbacks(self) -> None:
        callbacks, self._callbacks = self._callbacks, None
        for callback in callbacks or ():
            call_guarded(f"{self.method}: an on_cancel callback", callback)

    def _begin(self, work: Callable[[], Any]) -> None:
        """In the loop: admits the call and runs its handler in a task of its own."""
        owner = self._owner
        if self._is_cancelled:
            return
        if is_full(owner.options, len(owner.running)):
            self._send_status(full(owner.options))
            return
        owner.running.add(self)
        self._task = owner.loop.create_task(work())

    def _end(self) -> None:
        self._callbacks = None
        self._owner.forget(self)

    def _fail(self, error: BaseException) -> None:
        """Ends the RPC with the status of `error`; anything that is not a TensorwayError is a bug, and logged."""
        if isinstance(error, TensorwayError):
            self._send_status(error)
        elif isinstance(error, asyncio.CancelledError):
            self._send_status(stopped())
        else:
            _LOG.error("%s: the handler raised %s", self.method, type(error).__name__, exc_info=error)
            self._send_status(InternalError(f"{type(error).__name__}: {error}"))

    def _send_status(self, error: TensorwayError | None) -> None:
        """Ends the RPC: OK where `error` is None."""
        if self._has_answered or self._is_cancelled:
            return
        self._has_answered = True
        code, sentence, trailers = OK, "", self._trailers
        if error is not None:
            code, sentence, details = encode_error(error)
            trailers = (*trailers, (DETAILS_TRAILER, details))
        status = cygrpc.SendStatusFromServerOperation(trailers, code, sentence.encode(), _NO_FLAGS)
        if self._has_initial_metadata:
            self._start((status,), forget)
        else:
            self._start((cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS), status), forget)


class UnaryCall(ServerCall):
    """A call with one request and one reply."""

    __slots__ = ("_handler", "_request")

    def __init__(self, owner: CallOwner, event: Any, handler: UnaryHandler) -> None:
        super().__init__(owner, event)
        self._handler = handler
        self._request: bytes | None = None

    def arm(self) -> None:
        """In the polling thread: asks core for the request, and for news of the client."""
        self.arm_close()
        self._start((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), self._received)

    def _received(self, event: Any) -> Rest:
        self._request = event.batch_operations[0].message()
        return self._take_request

    def _take_request(self) -> None:
        if self._request is None:
            # The client closed its side without a message, sent one above the limit (core answers that), or has gone.
            self._send_status(no_request(self.method))
        else:
            self._begin(self._run)

    async def _run(self) -> None:
        request, self._request = self._request, None
        assert request is not None
        try:
            reply = await self._handler(request, self)
            if len(reply) > self._owner.options.max_message_bytes:
                raise too_large(len(reply), self._owner.options)
            self._reply(reply)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - becomes the RPC's status
            self._fail(error)
        finally:
            self._end()

    def _reply(self, reply: bytes) -> None:
        if self._is_cancelled:
            return
        self._has_answered = True
        self._start(
            (
                cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS),
                cygrpc.SendMessageOperation(reply, _NO_FLAGS),
                cygrpc.SendStatusFromServerOperation(self._trailers, OK, b"", _NO_FLAGS),
            ),
            forget,
        )

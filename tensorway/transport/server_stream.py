"""One streaming RPC of the completion-queue server."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final

from grpc._cython import cygrpc

from tensorway.errors import InternalError
from tensorway.transport.completion_queue import Rest
from tensorway.transport.listening import gone, too_large
from tensorway.transport.port import StreamHandler
from tensorway.transport.server_call import OK, CallOwner, ServerCall

_NO_FLAGS: Final = 0


class StreamCall(ServerCall):
    """See `tensorway.transport.port.Stream`. One message is read ahead: core takes in the next while the handler works on this one."""

    __slots__ = (
        "_arrived", "_handler", "_has_all", "_inbox", "_is_reading", "_is_writing", "_read_waiter", "_write_waiter", "_written_ok",
        "has_read",
    )  # fmt: skip

    def __init__(self, owner: CallOwner, event: Any, handler: StreamHandler) -> None:
        super().__init__(owner, event)
        self._handler = handler
        self._inbox: deque[bytes] = deque()
        self._arrived: bytes | None = None
        self._has_all = False
        #: Whether the handler has asked for a message.
        self.has_read = False
        self._is_reading = False
        self._is_writing = False
        self._written_ok = False
        self._read_waiter: asyncio.Future[None] | None = None
        self._write_waiter: asyncio.Future[None] | None = None

    def arm(self) -> Rest:
        """In the polling thread: asks core for the first message, and for news of the client; the handler begins in the loop."""
        self.arm_close()
        self._start_read()
        return self._take_call

    async def read(self) -> bytes | None:
        """See the port."""
        self.has_read = True
        while not self._inbox:
            if self._is_cancelled:
                raise gone()
            if self._has_all:
                return None
            if self._read_waiter is not None:
                raise InternalError(f"{self.method}: two reads at once")
            self._read_waiter = self._owner.loop.create_future()
            try:
                await self._read_waiter
            finally:
                self._read_waiter = None
        message = self._inbox.popleft()
        if not self._is_reading and not self._has_all and not self._is_cancelled:
            self._start_read()
        return message

    async def write(self, message: bytes) -> None:
        """See the port."""
        if self._is_cancelled:
            raise gone()
        if len(message) > self._owner.options.max_message_bytes:
            raise too_large(len(message), self._owner.options)
        if self._write_waiter is not None:
            raise InternalError(f"{self.method}: two writes at once")
        # Until core has let go of a message it takes no other, even where nobody waits for that one.
        await self._until_written()
        if self._is_cancelled:
            raise gone()
        result = self._begin_write(message)
        if result != OK:
            raise InternalError(f"{self.method}: grpc core refused a message with call error {result}")
        await self._until_written()
        if not self._written_ok:
            raise gone()

    def offer(self, message: bytes) -> bool:
        """See the port."""
        if self._is_writing or self._write_waiter is not None or self._is_cancelled or len(message) > self._owner.options.max_message_bytes:
            return False
        self._owner.hold_events()
        return self._begin_write(message) == OK

    def _begin_write(self, message: bytes) -> int:
        """Core's answer to the batch."""
        operations: tuple[Any, ...] = (cygrpc.SendMessageOperation(message, _NO_FLAGS),)
        if not self._has_initial_metadata:
            self._has_initial_metadata = True
            operations = (cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS), *operations)
        self._is_writing = True
        result: int = self._call.start_server_batch(operations, self._written)
        if result != OK:
            self._is_writing = False
        return result

    async def _until_written(self) -> None:
        """Returns once core has let go of the message that it has, if any."""
        try:
            while self._is_writing:
                waiter = self._write_waiter = self._owner.loop.create_future()
                # The polling thread clears the flag and then looks for a waiter: asked again, so that neither misses the other.
                if self._is_writing:
                    await waiter
        finally:
            self._write_waiter = None

    def _take_call(self) -> None:
        self._begin(self._run)

    async def _run(self) -> None:
        try:
            await self._handler(self)
            self._send_status(None)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - becomes the RPC's status
            self._fail(error)
        finally:
            self._end()

    def _start_read(self) -> None:
        self._is_reading = True
        self._start((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), self._received)

    def _received(self, event: Any) -> Rest:
        self._arrived = event.batch_operations[0].message()
        return self._take_message

    def _take_message(self) -> None:
        self._is_reading = False
        message, self._arrived = self._arrived, None
        if message is None:
            self._has_all = True
        else:
            self._inbox.append(message)
        if self._read_waiter is not None and not self._read_waiter.done():
            self._read_waiter.set_result(None)

    def _written(self, event: Any) -> Rest | None:
        """In the polling thread: the loop need not wake up for a message that nobody waits for."""
        self._written_ok = event.success
        self._is_writing = False
        return None if self._write_waiter is None else self._wake_writer

    def _wake_writer(self) -> None:
        if self._write_waiter is not None and not self._write_waiter.done():
            self._write_waiter.set_result(None)

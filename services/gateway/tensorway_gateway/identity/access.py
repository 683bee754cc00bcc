"""What the paths and servicers of the gateway ask: who calls. And a call that knows."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from tensorway.access.permissions import Action
from tensorway.deadline import Deadline
from tensorway.errors import InternalError, TensorwayError
from tensorway.transport.port import Call, Stream
from tensorway_gateway.identity.caller import EVERYBODY, Caller

if TYPE_CHECKING:
    from tensorway_gateway.identity.gate import Gate


class IdentifiedCall:
    """A call, and who made it. See `tensorway.transport.port.Call`."""

    __slots__ = ("_call", "caller")

    def __init__(self, call: Call, caller: Caller) -> None:
        self._call = call
        self.caller = caller

    @property
    def method(self) -> str:
        return self._call.method

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        return self._call.metadata

    @property
    def deadline(self) -> Deadline | None:
        return self._call.deadline

    @property
    def peer(self) -> str:
        return self._call.peer

    @property
    def peer_names(self) -> tuple[str, ...]:
        return self._call.peer_names

    def set_trailers(self, trailers: Sequence[tuple[str, str | bytes]]) -> None:
        self._call.set_trailers(trailers)

    def on_cancel(self, callback: Callable[[], None]) -> None:
        self._call.on_cancel(callback)


class IdentifiedStream(IdentifiedCall):
    """A stream, and who opened it. See `tensorway.transport.port.Stream`."""

    __slots__ = ("_check", "_has_read", "_identify", "_stream")

    def __init__(
        self, stream: Stream, caller: Caller, identify: Callable[[Call], Awaitable[Caller]], check: Callable[[bytes], None] | None = None
    ) -> None:
        """`identify` is asked again for each message but the first, so that a stream does not outlive its credential by more than what was
        begun; `check` sees each message before its reader does."""
        super().__init__(stream, caller)
        self._stream = stream
        self._identify = identify
        self._check = check
        self._has_read = False

    async def read(self) -> bytes | None:
        message = await self._stream.read()
        if message is not None and self._has_read:
            self.caller = await self._identify(self._stream)
        self._has_read = True
        if message is not None and self._check is not None:
            self._check(message)
        return message

    async def write(self, message: bytes) -> None:
        await self._stream.write(message)

    def offer(self, message: bytes) -> bool:
        return self._stream.offer(message)


class Access:
    """What the paths and servicers ask. One for a gateway."""

    __slots__ = ("_gate",)

    def __init__(self, gate: Gate | None) -> None:
        """None: everybody may do everything."""
        self._gate = gate

    def caller(self, call: Call) -> Caller:
        """Who calls. Raises InternalError for a call that did not come through the guarded server: rather closed than open."""
        if self._gate is None:
            return EVERYBODY
        caller = getattr(call, "caller", None)
        if not isinstance(caller, Caller):
            raise InternalError(f"{call.method}: the call was not let in by the gateway's guard")
        return caller

    def span_attributes(self, call: Call) -> dict[str, str]:
        """What a span says of who calls (OpenTelemetry's `enduser.id`); nothing where everybody may do everything."""
        return {} if self._gate is None else {"enduser.id": self.caller(call).principal}

    def count(self, error: TensorwayError, action: Action) -> None:
        """Counts what a path refused for want of permission or quota."""
        if self._gate is not None:
            self._gate.count(error, action.value)


#: Everybody may do everything.
OPEN: Final = Access(None)

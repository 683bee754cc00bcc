"""The gateway's server as its servicers see it: what reaches them has been let in."""

from __future__ import annotations

import asyncio
import time

from tensorway.access.permissions import Action
from tensorway.errors import InvalidRequest, PermissionDenied, Status, TensorwayError, Unauthenticated
from tensorway.transport.port import Call, Server, Stream, StreamHandler, UnaryHandler
from tensorway_gateway.identity.access import IdentifiedCall, IdentifiedStream
from tensorway_gateway.identity.audit import AuditEntry
from tensorway_gateway.identity.caller import Caller
from tensorway_gateway.identity.gate import Gate
from tensorway_gateway.identity.methods import Rule, Scope, rule_of
from tensorway_gateway.identity.quota import QuotaExceeded
from tensorway_gateway.identity.refusals import CredentialRefused

_REQUEST_ID = "x-request-id"
_MAX_CHARS = 256


class GuardedServer:
    """Implements `tensorway.transport.port.Server`. Every handler that is added answers only callers that may use its method."""

    def __init__(self, server: Server, gate: Gate) -> None:
        self._server = server
        self._gate = gate

    def add_unary(self, method: str, handler: UnaryHandler) -> None:
        """See `Server.add_unary`."""
        rule = rule_of(method)
        if rule.scope is Scope.OPEN:
            self._server.add_unary(method, handler)
        elif rule.scope is Scope.PATH:
            self._server.add_unary(method, self._to_path(rule, handler))
        else:
            self._server.add_unary(method, self._checked(rule, handler))

    def add_stream(self, method: str, handler: StreamHandler) -> None:
        """See `Server.add_stream`."""
        rule = rule_of(method)
        if rule.scope is Scope.OPEN:
            self._server.add_stream(method, handler)
        elif rule.scope is Scope.PATH:
            self._server.add_stream(method, self._stream_to_path(rule, handler))
        else:
            self._server.add_stream(method, self._checked_stream(rule, handler))

    async def start(self) -> str:
        """See `Server.start`."""
        return await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """See `Server.stop`."""
        await self._server.stop(grace_s)

    @property
    def num_in_flight(self) -> int:
        return self._server.num_in_flight

    def _to_path(self, rule: Rule, handler: UnaryHandler) -> UnaryHandler:
        """For what costs: its path checks model and quota, and answers for them."""

        async def guarded(message: bytes, call: Call) -> bytes:
            # Where the caller is known, nothing is awaited for it: this is on the way of every request.
            caller = self._known(call) or await self._identified(call)
            self._check_door(rule, caller)
            return await handler(message, IdentifiedCall(call, caller))

        return guarded

    def _stream_to_path(self, rule: Rule, handler: StreamHandler) -> StreamHandler:
        async def guarded(stream: Stream) -> None:
            caller = await self._identify(stream)
            self._check_door(rule, caller)
            try:
                caller.meter.open_stream()
            except QuotaExceeded as error:
                self._gate.count(error, "")
                raise
            try:
                await handler(IdentifiedStream(stream, caller, self._identify))
            finally:
                caller.meter.close_stream()

        return guarded

    def _checked(self, rule: Rule, handler: UnaryHandler) -> UnaryHandler:
        async def guarded(message: bytes, call: Call) -> bytes:
            visit = _Visit(self._gate, rule, call)
            try:
                visit.admit(await self._identify(call), message)
                return await handler(message, IdentifiedCall(call, visit.caller))
            except BaseException as error:
                visit.failed(error)
                raise
            finally:
                visit.end()

        return guarded

    def _checked_stream(self, rule: Rule, handler: StreamHandler) -> StreamHandler:
        async def guarded(stream: Stream) -> None:
            visit = _Visit(self._gate, rule, stream)
            try:
                visit.admit(await self._identify(stream), None)
                await handler(IdentifiedStream(stream, visit.caller, self._identify, visit.check))
            except BaseException as error:
                visit.failed(error)
                raise
            finally:
                visit.end()

        return guarded

    def _check_door(self, rule: Rule, caller: Caller) -> None:
        """Raises what keeps the caller from using the method for any model."""
        try:
            rule.check_door(caller)
        except (PermissionDenied, Unauthenticated) as error:
            self._gate.count(error, _word(rule))
            raise

    def _known(self, call: Call) -> Caller | None:
        try:
            return self._gate.known(call)
        except CredentialRefused as error:
            self._gate.refused(call, error)
            raise

    async def _identify(self, call: Call) -> Caller:
        return self._known(call) or await self._identified(call)

    async def _identified(self, call: Call) -> Caller:
        try:
            return await self._gate.identify(call)
        except CredentialRefused as error:
            self._gate.refused(call, error)
            raise


class _Visit:
    """One call of a method that no path checks: its permission, its place in the quota, and its line in the audit log."""

    def __init__(self, gate: Gate, rule: Rule, call: Call) -> None:
        self._gate = gate
        self._rule = rule
        self._call = call
        self._caller: Caller | None = None
        self._model = ""
        #: Of a call that was refused before its message was read.
        self._unread: bytes | None = None
        self._has_entered = False
        self._error: BaseException | None = None
        self._began_s = time.monotonic()

    @property
    def caller(self) -> Caller:
        assert self._caller is not None
        return self._caller

    def admit(self, caller: Caller, message: bytes | None) -> None:
        """Raises PermissionDenied, Unauthenticated or QuotaExceeded. `message` None: it comes later, through `check`."""
        self._caller = caller
        self._unread = message
        self._rule.check_door(caller)
        if message is not None:
            self.check(message)
        caller.enter()
        self._has_entered = True

    def check(self, message: bytes) -> None:
        """Of each message: whether it is about what the caller may use the method for."""
        self._unread = None
        self._model, is_wider = self._rule.read(message)
        self._rule.check_model(self.caller, self._model, is_wider=is_wider)

    def failed(self, error: BaseException) -> None:
        """It did not end well."""
        self._error = error

    def end(self) -> None:
        """The call is over."""
        error, caller = self._error, self._caller
        if caller is None:
            return  # nobody known: told where that was found
        if self._has_entered:
            caller.leave(time.monotonic() - self._began_s)
        if isinstance(error, TensorwayError):
            self._gate.count(error, _word(self._rule))
        if self._rule.action is not Action.MANAGE:
            return
        if self._unread is not None:
            self._model = self._named(self._unread)
        given = self._call.metadata.get(_REQUEST_ID, "")
        self._gate.audit.note(
            AuditEntry(
                principal=caller.principal, action=Action.MANAGE.value, method=self._call.method, model=self._model[:_MAX_CHARS],
                peer=self._call.peer, request_id=given[:_MAX_CHARS] if isinstance(given, str) else "", outcome=_outcome(error),
                status=_status(error).name, detail="" if error is None else str(error)[:_MAX_CHARS],
            )
        )

    def _named(self, message: bytes) -> str:
        """The model that a refused call was about; "" where that cannot be read."""
        try:
            return self._rule.read(message)[0]
        except InvalidRequest:
            return ""


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "allowed"
    return "refused" if isinstance(error, PermissionDenied | Unauthenticated | QuotaExceeded) else "failed"


def _status(error: BaseException | None) -> Status:
    if error is None:
        return Status.OK
    if isinstance(error, TensorwayError):
        return error.status
    return Status.CANCELLED if isinstance(error, asyncio.CancelledError) else Status.INTERNAL


def _word(rule: Rule) -> str:
    return "any" if rule.action is None else rule.action.value

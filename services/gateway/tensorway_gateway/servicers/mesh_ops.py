"""`tensorway.v1.MeshService`, its operations: profiles of groups and the log levels of members, passed on to whom they concern."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from google.protobuf.message import DecodeError

from tensorway.access.permissions import Action
from tensorway.deadline import Deadline
from tensorway.errors import InvalidRequest, NotFound, TensorwayError, Unavailable
from tensorway.registry.port import GATEWAY, GROUP, NODE, ORCHESTRATOR, Registration, Registry
from tensorway.telemetry.ops_service import PROFILE_GROUP, SET_LOG_LEVEL, check_level
from tensorway.tls import MeshTls
from tensorway.transport import AsyncChannel
from tensorway.transport.port import Call, Server, Stream
from tensorway.v1 import mesh_pb2, ops_pb2
from tensorway_gateway.catalog import Catalog
from tensorway_gateway.identity.access import OPEN, Access
from tensorway_gateway.servicers.mesh import SERVICE
from tensorway_gateway.servicers.registry_time import answered_in_time

_LOG = logging.getLogger(__name__)
_KINDS: Final = (GATEWAY, ORCHESTRATOR, NODE, GROUP)
#: What a member gets to change its level, seconds; the call's own deadline where that is earlier.
_MEMBER_S: Final = 3.0
#: Beyond what a profile is given to record: beginning, gathering and putting together.
_PROFILE_MORE_S: Final = 300.0
_DEFAULT_PROFILE_S: Final = 30.0
_CREDENTIALS: Final = ("authorization", "x-api-key")


class MeshOperations:
    """Answers Profile and SetMemberLogLevel."""

    def __init__(self, registry: Registry, catalog: Catalog, tls: MeshTls | None = None, access: Access = OPEN) -> None:
        self._registry = registry
        self._catalog = catalog
        self._tls = tls
        self._access = access

    def attach(self, server: Server) -> None:
        server.add_stream(f"/{SERVICE}/Profile", self.profile)
        server.add_unary(f"/{SERVICE}/SetMemberLogLevel", self.set_member_log_level)

    async def profile(self, stream: Stream) -> None:
        """One ProfileRequest in, the leader's messages out as they come: a ProfileResponse has the fields of a ProfileGroupResponse."""
        try:
            request = mesh_pb2.ProfileRequest.FromString(await stream.read() or b"")
        except DecodeError as error:
            raise InvalidRequest("the message is no ProfileRequest", field="request") from error
        async with answered_in_time(stream):
            group = self._choose(request, await self._registry.registrations(GROUP))
        self._access.caller(stream).permit(Action.MANAGE, group.metadata.get("model", ""))
        _LOG.info("profiling", extra={"fields": {"group": group.id, "model": group.metadata.get("model", "")}})
        longest = Deadline.after((request.options.max_seconds or _DEFAULT_PROFILE_S) + _PROFILE_MORE_S)
        deadline = min(longest, stream.deadline or longest)
        message = ops_pb2.ProfileGroupRequest(options=request.options).SerializeToString()
        async with self._channel(group) as channel:
            replies = channel.server_stream(PROFILE_GROUP, message, deadline.remaining_s())
            try:
                while (reply := await replies.read()) is not None:
                    await stream.write(reply)
            finally:
                await replies.cancel()

    def _choose(self, request: mesh_pb2.ProfileRequest, groups: Sequence[Registration]) -> Registration:
        """The group that is named, or one of the model's. Raises InvalidRequest, NotFound or Unavailable."""
        if request.group:
            found = [group for group in groups if group.id == request.group]
            if not found:
                known = ", ".join(sorted(group.id for group in groups)) or "none"
                raise NotFound(f"group {request.group[:128]!r} does not live; groups that do: {known}", field="group")
            if request.model and found[0].metadata.get("model") != request.model:
                served = found[0].metadata.get("model")
                raise InvalidRequest(f"group {request.group!r} serves {served!r}, not {request.model!r}", field="group")
            return found[0]
        model = self._catalog.find(request.model)
        own = [group for group in groups if group.metadata.get("model") == model.name]
        serving = [group for group in own if group.metadata.get("revision") == model.serving.spec.revision]
        if not own:
            raise Unavailable(f"model {model.name!r} has no live group to profile", retry_after_s=1.0)
        return random.choice(serving or own)

    async def set_member_log_level(self, message: bytes, call: Call) -> bytes:
        """SetMemberLogLevelRequest bytes in, what became of each member out."""
        try:
            request = mesh_pb2.SetMemberLogLevelRequest.FromString(message)
        except DecodeError as error:
            raise InvalidRequest("the message is no SetMemberLogLevelRequest", field="request") from error
        check_level(request.level, request.seconds)
        async with answered_in_time(call):
            found = [member for kind in _KINDS for member in await self._registry.registrations(kind)]
        wanted = set(request.members)
        missing = wanted - {member.id for member in found}
        if missing:
            raise NotFound(f"members: {', '.join(sorted(missing))} do not live; GetTopology shows who does", field="members")
        chosen = [member for member in found if not wanted or member.id in wanted]
        timeout_s = min(_MEMBER_S, call.deadline.remaining_s() if call.deadline is not None else _MEMBER_S)
        async with asyncio.TaskGroup() as tasks:
            changes = [
                tasks.create_task(self._change(member, request.level, request.seconds, timeout_s, _credentials(call, member)))
                for member in chosen
            ]
        return mesh_pb2.SetMemberLogLevelResponse(members=[change.result() for change in changes]).SerializeToString()

    async def _change(
        self, member: Registration, level: str, seconds: float, timeout_s: float, credentials: tuple[tuple[str, str], ...]
    ) -> mesh_pb2.MemberLogLevel:
        """What became of one member; that it could not be reached is no error of the others."""
        told = mesh_pb2.MemberLogLevel(kind=member.kind, id=member.id)
        message = ops_pb2.SetLogLevelRequest(level=level, seconds=seconds).SerializeToString()
        try:
            async with self._channel(member) as channel:
                reply = await channel.unary(SET_LOG_LEVEL, message, timeout_s, credentials)
        except TensorwayError as error:
            told.error = error.message or type(error).__name__
        else:
            told.previous = ops_pb2.SetLogLevelResponse.FromString(reply.response).previous
        return told

    @asynccontextmanager
    async def _channel(self, member: Registration) -> AsyncIterator[AsyncChannel]:
        channel = AsyncChannel(member.endpoint, tls=None if self._tls is None else self._tls.dial(member.kind))
        try:
            yield channel
        finally:
            await channel.close()


def _credentials(call: Call, member: Registration) -> tuple[tuple[str, str], ...]:
    """What the caller showed, for another gateway, which asks who calls as this one did. Nobody else is told."""
    if member.kind != GATEWAY:
        return ()
    return tuple((name, value) for name in _CREDENTIALS if isinstance(value := call.metadata.get(name), str))

"""`tensorway.v1.MeshService`: what the mesh is made of."""

from __future__ import annotations

import asyncio
from typing import Final

from google.protobuf.message import DecodeError

from tensorway.deadline import Deadline
from tensorway.errors import DeadlineExceeded, InvalidRequest
from tensorway.registry.port import GATEWAY, GROUP, NODE, ORCHESTRATOR, Registry
from tensorway.transport.port import Call, Server
from tensorway.v1 import mesh_pb2

SERVICE: Final = "tensorway.v1.MeshService"
_KINDS: Final = (GATEWAY, ORCHESTRATOR, NODE, GROUP)
_DEFAULT_TIMEOUT_S: Final = 5.0


class MeshServicer:
    """Answers GetTopology straight from the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def attach(self, server: Server) -> None:
        server.add_unary(f"/{SERVICE}/GetTopology", self.get_topology)

    async def get_topology(self, message: bytes, call: Call) -> bytes:
        try:
            mesh_pb2.GetTopologyRequest.FromString(message)
        except DecodeError as error:
            raise InvalidRequest("the message is no GetTopologyRequest", field="request") from error
        deadline = call.deadline or Deadline.after(_DEFAULT_TIMEOUT_S)
        try:
            async with asyncio.timeout(deadline.remaining_s()):
                found = [registration for kind in _KINDS for registration in await self._registry.registrations(kind)]
        except TimeoutError as error:
            raise DeadlineExceeded("the deadline passed while the registry had not answered", hop="registry") from error
        members = [
            mesh_pb2.Member(kind=member.kind, id=member.id, endpoint=member.endpoint, metadata=dict(member.metadata)) for member in found
        ]
        return mesh_pb2.GetTopologyResponse(members=members).SerializeToString()

"""`tensorway.v1.MeshService`: what the mesh is made of, and what it has to do."""

from __future__ import annotations

import logging
from typing import Final

from google.protobuf.message import DecodeError
from pydantic import ValidationError

from tensorway.access.permissions import Action
from tensorway.errors import InvalidRequest
from tensorway.loads import ModelLoad, decode_loads, load_key
from tensorway.registry.port import GATEWAY, GROUP, NODE, ORCHESTRATOR, Registry
from tensorway.transport.port import Call, Server
from tensorway.v1 import mesh_pb2
from tensorway_gateway.catalog import Catalog
from tensorway_gateway.identity.access import OPEN, Access
from tensorway_gateway.load import SummedLoad, sum_loads
from tensorway_gateway.servicers.registry_time import answered_in_time

_LOG = logging.getLogger(__name__)
SERVICE: Final = "tensorway.v1.MeshService"
_KINDS: Final = (GATEWAY, ORCHESTRATOR, NODE, GROUP)


class MeshServicer:
    """Answers GetTopology and GetLoad straight from the registry."""

    def __init__(self, registry: Registry, catalog: Catalog, access: Access = OPEN) -> None:
        self._registry = registry
        self._catalog = catalog
        self._access = access

    def attach(self, server: Server) -> None:
        server.add_unary(f"/{SERVICE}/GetTopology", self.get_topology)
        server.add_unary(f"/{SERVICE}/GetLoad", self.get_load)

    async def get_topology(self, message: bytes, call: Call) -> bytes:
        try:
            mesh_pb2.GetTopologyRequest.FromString(message)
        except DecodeError as error:
            raise InvalidRequest("the message is no GetTopologyRequest", field="request") from error
        async with answered_in_time(call):
            found = [registration for kind in _KINDS for registration in await self._registry.registrations(kind)]
        members = [
            mesh_pb2.Member(kind=member.kind, id=member.id, endpoint=member.endpoint, metadata=dict(member.metadata)) for member in found
        ]
        return mesh_pb2.GetTopologyResponse(members=members).SerializeToString()

    async def get_load(self, message: bytes, call: Call) -> bytes:
        try:
            name = mesh_pb2.GetLoadRequest.FromString(message).model
        except DecodeError as error:
            raise InvalidRequest("the message is no GetLoadRequest", field="request") from error
        caller = self._access.caller(call)
        if name:
            models = [self._catalog.find(name, caller.sees)]
        else:
            models = [model for model in self._catalog.models.values() if caller.grants.allows(Action.OBSERVE, model.name)]
        async with answered_in_time(call):
            said = [(each.id, await self._said(each.id)) for each in await self._registry.registrations(ORCHESTRATOR)]
        return mesh_pb2.GetLoadResponse(loads=[_write(sum_loads(model, said)) for model in models]).SerializeToString()

    async def _said(self, orchestrator: str) -> tuple[ModelLoad, ...]:
        """What an orchestrator says of its models; nothing where it has not spoken yet."""
        document = await self._registry.read(load_key(orchestrator))
        try:
            return () if document is None else decode_loads(document)
        except ValidationError as error:
            _LOG.error("the document of orchestrator %s holds no loads and is ignored: %s", orchestrator, error)
            return ()


def _write(load: SummedLoad) -> mesh_pb2.ModelLoad:
    model = load.model
    rule = model.serving.spec.scaling
    return mesh_pb2.ModelLoad(
        model=model.name, revision=model.serving.spec.revision, arrival_rows_per_second=load.arrival_rows_per_s,
        queue_seconds=load.queue_s, utilisation_ratio=load.utilisation, num_ready_replicas=model.serving.num_ready_replicas,
        num_wanted_replicas=model.num_replicas, predicted_replicas=load.predicted_replicas, waiting_rows=load.waiting_rows,
        num_open_requests=load.num_open, min_replicas=0 if rule is None else rule.min_replicas,
        max_replicas=0 if rule is None else rule.max_replicas, orchestrators=[_write_part(id, part) for id, part in load.parts],
    )


def _write_part(orchestrator: str, load: ModelLoad) -> mesh_pb2.OrchestratorLoad:
    return mesh_pb2.OrchestratorLoad(
        orchestrator=orchestrator, arrival_rows_per_second=load.arrival_rows_per_s, queue_seconds=load.queue_s,
        utilisation_ratio=load.utilisation, predicted_replicas=load.predicted_replicas, waiting_rows=load.waiting_rows,
        num_open_requests=load.num_open, replica_rows_per_second=load.replica_rows_per_s, idle_seconds=load.idle_s,
    )

"""`tensorway.v1.ModelService`: what the mesh can run, and how often."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Final

from google.protobuf.message import DecodeError

from tensorway.errors import InvalidRequest
from tensorway.registry.amending import amend
from tensorway.registry.port import DESIRED, Registry
from tensorway.signature import TensorSpec
from tensorway.transport.port import Call, Server
from tensorway.v1 import model_pb2
from tensorway_gateway.catalog import Catalog
from tensorway_gateway.identity.access import OPEN, Access
from tensorway_gateway.models import Model, ModelState
from tensorway_gateway.scale import check_replicas, with_replicas
from tensorway_gateway.servicers.registry_time import answered_in_time

SERVICE: Final = "tensorway.v1.ModelService"
_STATES: Final = {
    ModelState.LOADING: model_pb2.MODEL_STATE_LOADING,
    ModelState.READY: model_pb2.MODEL_STATE_READY,
    ModelState.UNAVAILABLE: model_pb2.MODEL_STATE_UNAVAILABLE,
}


class ModelServicer:
    """Answers ListModels, GetModel and ScaleModel."""

    def __init__(self, catalog: Catalog, registry: Registry, access: Access = OPEN) -> None:
        self._catalog = catalog
        self._registry = registry
        self._access = access

    def attach(self, server: Server) -> None:
        server.add_unary(f"/{SERVICE}/ListModels", self.list_models)
        server.add_unary(f"/{SERVICE}/GetModel", self.get_model)
        server.add_unary(f"/{SERVICE}/ScaleModel", self.scale_model)

    async def list_models(self, message: bytes, call: Call) -> bytes:
        try:
            model_pb2.ListModelsRequest.FromString(message)
        except DecodeError as error:
            raise InvalidRequest("the message is no ListModelsRequest", field="request") from error
        sees = self._access.caller(call).sees
        return model_pb2.ListModelsResponse(
            models=[_write(model) for model in self._catalog.models.values() if sees(model.name)]
        ).SerializeToString()

    async def get_model(self, message: bytes, call: Call) -> bytes:
        try:
            name = model_pb2.GetModelRequest.FromString(message).name
        except DecodeError as error:
            raise InvalidRequest("the message is no GetModelRequest", field="request") from error
        return model_pb2.GetModelResponse(model=_write(self._catalog.find(name, self._access.caller(call).sees))).SerializeToString()

    async def scale_model(self, message: bytes, call: Call) -> bytes:
        try:
            request = model_pb2.ScaleModelRequest.FromString(message)
        except DecodeError as error:
            raise InvalidRequest("the message is no ScaleModelRequest", field="request") from error
        model = self._catalog.find(request.model, self._access.caller(call).sees)
        spec = model.serving.spec
        check_replicas(spec, request.replicas)
        key = f"{DESIRED}{spec.model}"
        async with answered_in_time(call):
            await amend(self._registry, key, partial(with_replicas, spec, request.replicas))
        return model_pb2.ScaleModelResponse(model=_write(replace(model, num_replicas=request.replicas))).SerializeToString()


def _write(model: Model) -> model_pb2.Model:
    serving = model.serving
    spec = serving.spec
    return model_pb2.Model(
        name=model.name, revision=spec.revision, version=spec.version, engine=spec.engine, state=_STATES[serving.state],
        reason=serving.reason,
        inputs=map(_write_spec, spec.signature.inputs), outputs=map(_write_spec, spec.signature.outputs),
        max_rows=spec.batching.max_rows if spec.signature.is_batchable else 0,
        num_replicas=model.num_replicas, num_ready_replicas=serving.num_ready_replicas, description=spec.description,
        is_dormant=serving.is_dormant,
    )


def _write_spec(spec: TensorSpec) -> model_pb2.TensorSpec:
    dimensions = [
        model_pb2.Dimension(extent=dimension) if isinstance(dimension, int) else model_pb2.Dimension(extent=-1, name=dimension)
        for dimension in spec.shape
    ]
    return model_pb2.TensorSpec(name=spec.name, dtype=spec.dtype, shape=dimensions)  # type: ignore[arg-type]

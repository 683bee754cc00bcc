"""What the Open Inference Protocol v2 and its extensions ask about the server and its models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from tensorway import __version__
from tensorway.access.permissions import Action
from tensorway.compat import grpc_service_pb2 as oip
from tensorway.errors import InvalidRequest, NotFound
from tensorway.transport.port import Call, Server
from tensorway_gateway.catalog import Catalog
from tensorway_gateway.identity.access import OPEN, Access
from tensorway_gateway.identity.caller import EVERYBODY, Caller
from tensorway_gateway.identity.methods import Scope, rule_of
from tensorway_gateway.models import Model, ModelState, Revision
from tensorway_gateway.servicers.oip import SERVICE
from tensorway_gateway.servicers.oip_config import write_config, write_metadata, write_statistics
from tensorway_gateway.statistics import Statistics

#: Extensions of the protocol that are really here.
EXTENSIONS: Final = ("model_configuration", "schedule_policy", "binary_tensor_data", "parameters", "statistics")

RequestT = TypeVar("RequestT", bound=Message)
Answerer = Callable[[RequestT, Caller], Message]


class OipModelServicer:
    """Answers everything of the protocol that needs no group."""

    def __init__(self, catalog: Catalog, statistics: Statistics, is_ready: Callable[[], bool], access: Access = OPEN) -> None:
        self._catalog = catalog
        self._statistics = statistics
        self._is_ready = is_ready
        self._access = access

    def attach(self, server: Server) -> None:
        self._add(server, "ServerLive", oip.ServerLiveRequest, lambda _, caller: oip.ServerLiveResponse(live=True))
        self._add(server, "ServerReady", oip.ServerReadyRequest, lambda _, caller: oip.ServerReadyResponse(ready=self._is_ready()))
        self._add(server, "ServerMetadata", oip.ServerMetadataRequest, self._server_metadata)
        self._add(server, "ModelReady", oip.ModelReadyRequest, self._model_ready)
        self._add(server, "ModelMetadata", oip.ModelMetadataRequest, self._model_metadata)
        self._add(server, "ModelConfig", oip.ModelConfigRequest, self._model_config)
        self._add(server, "ModelStatistics", oip.ModelStatisticsRequest, self._model_statistics)
        self._add(server, "RepositoryIndex", oip.RepositoryIndexRequest, self._repository_index)

    def _server_metadata(self, _: oip.ServerMetadataRequest, caller: Caller) -> oip.ServerMetadataResponse:
        return oip.ServerMetadataResponse(name="tensorway", version=__version__, extensions=EXTENSIONS)

    def _model_ready(self, request: oip.ModelReadyRequest, caller: Caller) -> oip.ModelReadyResponse:
        """Known but not ready is an answer; unknown is NOT_FOUND. A model that is scaled to zero is ready, for it answers: a load balancer
        that sent it nothing would keep it from ever starting."""
        _, revision = self._find(request.name, request.version, caller)
        return oip.ModelReadyResponse(ready=(revision.state is ModelState.READY or revision.is_dormant) and self._is_ready())

    def _model_metadata(self, request: oip.ModelMetadataRequest, caller: Caller) -> oip.ModelMetadataResponse:
        return write_metadata(*self._find(request.name, request.version, caller))

    def _model_config(self, request: oip.ModelConfigRequest, caller: Caller) -> oip.ModelConfigResponse:
        return oip.ModelConfigResponse(config=write_config(*self._find(request.name, request.version, caller)))

    def _model_statistics(self, request: oip.ModelStatisticsRequest, caller: Caller) -> oip.ModelStatisticsResponse:
        if request.name:
            chosen = [self._find(request.name, request.version, caller)]
        else:
            allowed = [model for model in self._catalog.models.values() if caller.grants.allows(Action.OBSERVE, model.name)]
            chosen = [(model, revision) for model in allowed for revision in model.revisions]
        return oip.ModelStatisticsResponse(model_stats=[write_statistics(revision, self._statistics) for _, revision in chosen])

    def _repository_index(self, request: oip.RepositoryIndexRequest, caller: Caller) -> oip.RepositoryIndexResponse:
        if request.repository_name:
            raise NotFound(f"repository {request.repository_name[:128]!r} is unknown; leave the name empty", field="repository_name")
        entries = [
            oip.RepositoryIndexResponse.ModelIndex(
                name=model.name, version=revision.spec.version, state=revision.state.value, reason=revision.reason
            )
            for model in self._catalog.models.values()
            for revision in model.revisions
            if caller.sees(model.name) and (revision.state is ModelState.READY or not request.ready)
        ]
        return oip.RepositoryIndexResponse(models=entries)

    def _find(self, name: str, version: str, caller: Caller) -> tuple[Model, Revision]:
        model = self._catalog.find(name, caller.sees)
        return model, model.find(version, is_version=True)

    def _add(self, server: Server, rpc: str, kind: type[RequestT], answer: Answerer[RequestT]) -> None:
        """One unary RPC from request message to response message."""
        # Whether the server lives and is ready is told to anybody.
        is_open = rule_of(f"/{SERVICE}/{rpc}").scope is Scope.OPEN

        async def handle(message: bytes, call: Call) -> bytes:
            try:
                request = kind.FromString(message)
            except DecodeError as error:
                raise InvalidRequest(f"the message is no {kind.DESCRIPTOR.name}", field="request") from error
            return answer(request, EVERYBODY if is_open else self._access.caller(call)).SerializeToString()

        server.add_unary(f"/{SERVICE}/{rpc}", handle)

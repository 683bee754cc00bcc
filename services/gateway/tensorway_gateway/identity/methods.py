"""What each method of each dialect asks of its caller. A method that is not here asks for everything, so that one that was forgotten is
closed rather than open."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final

from google.protobuf.message import DecodeError

from tensorway.access.permissions import Action
from tensorway.compat import grpc_service_pb2 as oip
from tensorway.errors import InvalidRequest
from tensorway.v1 import mesh_pb2, model_pb2
from tensorway_gateway.identity.caller import Caller


class Scope(Enum):
    """What the action is done to, and who looks."""

    #: Nobody is asked who they are.
    OPEN = auto()
    #: Nothing that belongs to a model; allowed to whoever may do anything at all.
    NOTHING = auto()
    #: Each request names its model, which the request's path checks before it looks the model up.
    PATH = auto()
    #: The message names one model.
    MODEL = auto()
    #: The message may name one model; without, the answer holds those that the caller sees, which the servicer chooses.
    LIST = auto()
    #: The whole mesh.
    MESH = auto()


@dataclass(frozen=True, slots=True)
class Rule:
    """Of one method."""

    scope: Scope
    #: None: any action will do.
    action: Action | None = None
    #: Message of the request, for the scopes that look into it.
    message: Any = None
    field: str = ""
    #: A field that names something besides models: where it is set, the caller needs the action on every model.
    wider_field: str = ""

    def check_door(self, caller: Caller) -> None:
        """What can be said before the message is read. Raises PermissionDenied or Unauthenticated."""
        if self.scope is Scope.MESH:
            assert self.action is not None
            caller.permit_everywhere(self.action)
        elif not caller.grants.allows_somewhere(self.action):
            raise caller.refusal(self.action, "any model", "")

    def read(self, message: bytes) -> tuple[str, bool]:
        """The model that a message names, "" for none; and whether it names more than a model. Raises InvalidRequest."""
        if self.message is None:
            return "", False
        try:
            request = self.message.FromString(message)
        except DecodeError as error:
            raise InvalidRequest(f"the message is no {self.message.DESCRIPTOR.name}", field="request") from error
        return getattr(request, self.field), bool(self.wider_field and getattr(request, self.wider_field))

    def check_model(self, caller: Caller, model: str, *, is_wider: bool) -> None:
        """Of what `read` found. Raises like `check_door`."""
        if self.message is None or (self.scope is Scope.LIST and not model):
            return
        if self.action is None:
            caller.permit_sight(model)
        elif is_wider:
            caller.permit_everywhere(self.action)
        else:
            caller.permit(self.action, model)


_OPEN: Final = Rule(Scope.OPEN)
_KNOWN: Final = Rule(Scope.NOTHING)
_INFER: Final = Rule(Scope.PATH, Action.INFER)
_LISTED: Final = Rule(Scope.LIST)
_OBSERVE_MESH: Final = Rule(Scope.MESH, Action.OBSERVE)
#: Also the rule of a method that is not in the table.
_MANAGE_MESH: Final = Rule(Scope.MESH, Action.MANAGE)


def _model(message: Any, field: str, action: Action | None = None, wider_field: str = "") -> Rule:
    return Rule(Scope.MODEL, action, message, field, wider_field)


_V1: Final = "/tensorway.v1."
_OIP: Final = "/inference.GRPCInferenceService/"
RULES: Final[dict[str, Rule]] = {
    "/grpc.health.v1.Health/Check": _OPEN,
    "/grpc.health.v1.Health/Watch": _OPEN,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _KNOWN,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": _KNOWN,
    f"{_V1}InferenceService/Infer": _INFER,
    f"{_V1}InferenceService/Generate": _INFER,
    f"{_V1}InferenceService/Explain": Rule(Scope.PATH, Action.EXPLAIN),
    f"{_V1}ModelService/ListModels": _LISTED,
    f"{_V1}ModelService/GetModel": _model(model_pb2.GetModelRequest, "name"),
    f"{_V1}ModelService/ScaleModel": _model(model_pb2.ScaleModelRequest, "model", Action.MANAGE),
    f"{_V1}MeshService/GetTopology": _OBSERVE_MESH,
    f"{_V1}MeshService/GetLoad": Rule(Scope.LIST, Action.OBSERVE, mesh_pb2.GetLoadRequest, "model"),
    # A group's name says nothing certain of its model.
    f"{_V1}MeshService/Profile": _model(mesh_pb2.ProfileRequest, "model", Action.MANAGE, "group"),
    f"{_V1}MeshService/SetMemberLogLevel": _MANAGE_MESH,
    f"{_V1}OpsService/GetLogLevel": _OBSERVE_MESH,
    f"{_V1}OpsService/SetLogLevel": _MANAGE_MESH,
    f"{_V1}OpsService/ProfileGroup": _MANAGE_MESH,
    f"{_OIP}ServerLive": _OPEN,
    f"{_OIP}ServerReady": _OPEN,
    f"{_OIP}ServerMetadata": _KNOWN,
    f"{_OIP}ModelReady": _model(oip.ModelReadyRequest, "name"),
    f"{_OIP}ModelMetadata": _model(oip.ModelMetadataRequest, "name"),
    f"{_OIP}ModelConfig": _model(oip.ModelConfigRequest, "name"),
    f"{_OIP}ModelStatistics": Rule(Scope.LIST, Action.OBSERVE, oip.ModelStatisticsRequest, "name"),
    f"{_OIP}RepositoryIndex": _LISTED,
    f"{_OIP}ModelInfer": _INFER,
    f"{_OIP}ModelStreamInfer": _INFER,
    f"{_OIP}RepositoryModelLoad": _model(oip.RepositoryModelLoadRequest, "model_name", Action.MANAGE),
    f"{_OIP}RepositoryModelUnload": _model(oip.RepositoryModelUnloadRequest, "model_name", Action.MANAGE),
    **{
        f"{_OIP}{kind}SharedMemory{verb}": _MANAGE_MESH
        for kind in ("System", "Cuda") for verb in ("Status", "Register", "Unregister")
    },
    f"{_OIP}TraceSetting": _MANAGE_MESH,
    f"{_OIP}LogSettings": _MANAGE_MESH,
}


def rule_of(method: str) -> Rule:
    """The rule of a full method name."""
    return RULES.get(method, _MANAGE_MESH)


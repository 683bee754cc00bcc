from google.api import annotations_pb2 as _annotations_pb2
from tensorway.v1 import ops_pb2 as _ops_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetTopologyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTopologyResponse(_message.Message):
    __slots__ = ("members",)
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("kind", "id", "endpoint", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    kind: str
    id: str
    endpoint: str
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, kind: _Optional[str] = ..., id: _Optional[str] = ..., endpoint: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("loads",)
    LOADS_FIELD_NUMBER: _ClassVar[int]
    loads: _containers.RepeatedCompositeFieldContainer[ModelLoad]
    def __init__(self, loads: _Optional[_Iterable[_Union[ModelLoad, _Mapping]]] = ...) -> None: ...

class ModelLoad(_message.Message):
    __slots__ = ("model", "revision", "arrival_rows_per_second", "queue_seconds", "utilisation_ratio", "num_ready_replicas", "num_wanted_replicas", "predicted_replicas", "waiting_rows", "num_open_requests", "min_replicas", "max_replicas", "orchestrators")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_ROWS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UTILISATION_RATIO_FIELD_NUMBER: _ClassVar[int]
    NUM_READY_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    NUM_WANTED_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    WAITING_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MIN_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    ORCHESTRATORS_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    arrival_rows_per_second: float
    queue_seconds: float
    utilisation_ratio: float
    num_ready_replicas: int
    num_wanted_replicas: int
    predicted_replicas: float
    waiting_rows: int
    num_open_requests: int
    min_replicas: int
    max_replicas: int
    orchestrators: _containers.RepeatedCompositeFieldContainer[OrchestratorLoad]
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., arrival_rows_per_second: _Optional[float] = ..., queue_seconds: _Optional[float] = ..., utilisation_ratio: _Optional[float] = ..., num_ready_replicas: _Optional[int] = ..., num_wanted_replicas: _Optional[int] = ..., predicted_replicas: _Optional[float] = ..., waiting_rows: _Optional[int] = ..., num_open_requests: _Optional[int] = ..., min_replicas: _Optional[int] = ..., max_replicas: _Optional[int] = ..., orchestrators: _Optional[_Iterable[_Union[OrchestratorLoad, _Mapping]]] = ...) -> None: ...

class OrchestratorLoad(_message.Message):
    __slots__ = ("orchestrator", "arrival_rows_per_second", "queue_seconds", "utilisation_ratio", "predicted_replicas", "waiting_rows", "num_open_requests", "replica_rows_per_second", "idle_seconds")
    ORCHESTRATOR_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_ROWS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UTILISATION_RATIO_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    WAITING_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ROWS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    orchestrator: str
    arrival_rows_per_second: float
    queue_seconds: float
    utilisation_ratio: float
    predicted_replicas: float
    waiting_rows: int
    num_open_requests: int
    replica_rows_per_second: float
    idle_seconds: float
    def __init__(self, orchestrator: _Optional[str] = ..., arrival_rows_per_second: _Optional[float] = ..., queue_seconds: _Optional[float] = ..., utilisation_ratio: _Optional[float] = ..., predicted_replicas: _Optional[float] = ..., waiting_rows: _Optional[int] = ..., num_open_requests: _Optional[int] = ..., replica_rows_per_second: _Optional[float] = ..., idle_seconds: _Optional[float] = ...) -> None: ...

class ProfileRequest(_message.Message):
    __slots__ = ("model", "group", "options")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    group: str
    options: _ops_pb2.ProfileOptions
    def __init__(self, model: _Optional[str] = ..., group: _Optional[str] = ..., options: _Optional[_Union[_ops_pb2.ProfileOptions, _Mapping]] = ...) -> None: ...

class ProfileResponse(_message.Message):
    __slots__ = ("progress", "data")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    progress: _ops_pb2.ProfileProgress
    data: bytes
    def __init__(self, progress: _Optional[_Union[_ops_pb2.ProfileProgress, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class SetMemberLogLevelRequest(_message.Message):
    __slots__ = ("level", "members", "seconds")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    level: str
    members: _containers.RepeatedScalarFieldContainer[str]
    seconds: float
    def __init__(self, level: _Optional[str] = ..., members: _Optional[_Iterable[str]] = ..., seconds: _Optional[float] = ...) -> None: ...

class SetMemberLogLevelResponse(_message.Message):
    __slots__ = ("members",)
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[MemberLogLevel]
    def __init__(self, members: _Optional[_Iterable[_Union[MemberLogLevel, _Mapping]]] = ...) -> None: ...

class MemberLogLevel(_message.Message):
    __slots__ = ("kind", "id", "previous", "error")
    KIND_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    kind: str
    id: str
    previous: str
    error: str
    def __init__(self, kind: _Optional[str] = ..., id: _Optional[str] = ..., previous: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

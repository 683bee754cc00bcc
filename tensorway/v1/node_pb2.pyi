from tensorway.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GroupState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GROUP_STATE_UNSPECIFIED: _ClassVar[GroupState]
    GROUP_STATE_STARTING: _ClassVar[GroupState]
    GROUP_STATE_LOADING: _ClassVar[GroupState]
    GROUP_STATE_WARMING: _ClassVar[GroupState]
    GROUP_STATE_READY: _ClassVar[GroupState]
    GROUP_STATE_BACKING_OFF: _ClassVar[GroupState]
    GROUP_STATE_STOPPING: _ClassVar[GroupState]

class RankState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RANK_STATE_UNSPECIFIED: _ClassVar[RankState]
    RANK_STATE_STARTING: _ClassVar[RankState]
    RANK_STATE_LOADING: _ClassVar[RankState]
    RANK_STATE_WARMING: _ClassVar[RankState]
    RANK_STATE_READY: _ClassVar[RankState]
    RANK_STATE_STOPPING: _ClassVar[RankState]
    RANK_STATE_FAILED: _ClassVar[RankState]

class Loss(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOSS_UNSPECIFIED: _ClassVar[Loss]
    LOSS_CROSS_ENTROPY: _ClassVar[Loss]
    LOSS_MSE: _ClassVar[Loss]
    LOSS_COSINE: _ClassVar[Loss]

class Optimizer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPTIMIZER_UNSPECIFIED: _ClassVar[Optimizer]
    OPTIMIZER_SGD: _ClassVar[Optimizer]
    OPTIMIZER_ADAMW: _ClassVar[Optimizer]

class AdaptationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTATION_STATE_UNSPECIFIED: _ClassVar[AdaptationState]
    ADAPTATION_STATE_STARTING: _ClassVar[AdaptationState]
    ADAPTATION_STATE_TRAINING: _ClassVar[AdaptationState]
    ADAPTATION_STATE_WRITING: _ClassVar[AdaptationState]
    ADAPTATION_STATE_DONE: _ClassVar[AdaptationState]
GROUP_STATE_UNSPECIFIED: GroupState
GROUP_STATE_STARTING: GroupState
GROUP_STATE_LOADING: GroupState
GROUP_STATE_WARMING: GroupState
GROUP_STATE_READY: GroupState
GROUP_STATE_BACKING_OFF: GroupState
GROUP_STATE_STOPPING: GroupState
RANK_STATE_UNSPECIFIED: RankState
RANK_STATE_STARTING: RankState
RANK_STATE_LOADING: RankState
RANK_STATE_WARMING: RankState
RANK_STATE_READY: RankState
RANK_STATE_STOPPING: RankState
RANK_STATE_FAILED: RankState
LOSS_UNSPECIFIED: Loss
LOSS_CROSS_ENTROPY: Loss
LOSS_MSE: Loss
LOSS_COSINE: Loss
OPTIMIZER_UNSPECIFIED: Optimizer
OPTIMIZER_SGD: Optimizer
OPTIMIZER_ADAMW: Optimizer
ADAPTATION_STATE_UNSPECIFIED: AdaptationState
ADAPTATION_STATE_STARTING: AdaptationState
ADAPTATION_STATE_TRAINING: AdaptationState
ADAPTATION_STATE_WRITING: AdaptationState
ADAPTATION_STATE_DONE: AdaptationState

class RunRanksRequest(_message.Message):
    __slots__ = ("orders", "answer", "stop", "beat")
    ORDERS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    orders: RankOrders
    answer: StoreAnswer
    stop: StopRanks
    beat: OwnerBeat
    def __init__(self, orders: _Optional[_Union[RankOrders, _Mapping]] = ..., answer: _Optional[_Union[StoreAnswer, _Mapping]] = ..., stop: _Optional[_Union[StopRanks, _Mapping]] = ..., beat: _Optional[_Union[OwnerBeat, _Mapping]] = ...) -> None: ...

class RankOrders(_message.Message):
    __slots__ = ("model", "revision", "group", "epoch", "owner", "first_rank", "num_ranks", "pipeline", "tensor", "secret", "verify", "heartbeat_s", "hung_after_s", "grace_s")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    FIRST_RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    HUNG_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    group: str
    epoch: int
    owner: str
    first_rank: int
    num_ranks: int
    pipeline: int
    tensor: int
    secret: str
    verify: bool
    heartbeat_s: float
    hung_after_s: float
    grace_s: float
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., group: _Optional[str] = ..., epoch: _Optional[int] = ..., owner: _Optional[str] = ..., first_rank: _Optional[int] = ..., num_ranks: _Optional[int] = ..., pipeline: _Optional[int] = ..., tensor: _Optional[int] = ..., secret: _Optional[str] = ..., verify: _Optional[bool] = ..., heartbeat_s: _Optional[float] = ..., hung_after_s: _Optional[float] = ..., grace_s: _Optional[float] = ...) -> None: ...

class StoreAnswer(_message.Message):
    __slots__ = ("rank", "line")
    RANK_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    line: bytes
    def __init__(self, rank: _Optional[int] = ..., line: _Optional[bytes] = ...) -> None: ...

class StopRanks(_message.Message):
    __slots__ = ("grace_s",)
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    grace_s: float
    def __init__(self, grace_s: _Optional[float] = ...) -> None: ...

class OwnerBeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RunRanksResponse(_message.Message):
    __slots__ = ("started", "status", "output", "operation", "exit")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    started: StartedRanks
    status: RankLine
    output: RankLine
    operation: RankLine
    exit: RankExit
    def __init__(self, started: _Optional[_Union[StartedRanks, _Mapping]] = ..., status: _Optional[_Union[RankLine, _Mapping]] = ..., output: _Optional[_Union[RankLine, _Mapping]] = ..., operation: _Optional[_Union[RankLine, _Mapping]] = ..., exit: _Optional[_Union[RankExit, _Mapping]] = ...) -> None: ...

class StartedRanks(_message.Message):
    __slots__ = ("ranks",)
    RANKS_FIELD_NUMBER: _ClassVar[int]
    ranks: _containers.RepeatedCompositeFieldContainer[StartedRank]
    def __init__(self, ranks: _Optional[_Iterable[_Union[StartedRank, _Mapping]]] = ...) -> None: ...

class StartedRank(_message.Message):
    __slots__ = ("rank", "pid", "device")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    pid: int
    device: str
    def __init__(self, rank: _Optional[int] = ..., pid: _Optional[int] = ..., device: _Optional[str] = ...) -> None: ...

class RankLine(_message.Message):
    __slots__ = ("rank", "line")
    RANK_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    line: bytes
    def __init__(self, rank: _Optional[int] = ..., line: _Optional[bytes] = ...) -> None: ...

class RankExit(_message.Message):
    __slots__ = ("rank", "code")
    RANK_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    code: int
    def __init__(self, rank: _Optional[int] = ..., code: _Optional[int] = ...) -> None: ...

class ListGroupsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListGroupsResponse(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    def __init__(self, groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("id", "model", "revision", "epoch", "state", "reason", "endpoint", "pids", "memory_bytes", "ranks", "detail", "num_running_answers", "num_waiting_answers", "num_free_blocks")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    PIDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_ANSWERS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_ANSWERS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    revision: str
    epoch: int
    state: GroupState
    reason: str
    endpoint: str
    pids: _containers.RepeatedScalarFieldContainer[int]
    memory_bytes: int
    ranks: _containers.RepeatedCompositeFieldContainer[Rank]
    detail: str
    num_running_answers: int
    num_waiting_answers: int
    num_free_blocks: int
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., revision: _Optional[str] = ..., epoch: _Optional[int] = ..., state: _Optional[_Union[GroupState, str]] = ..., reason: _Optional[str] = ..., endpoint: _Optional[str] = ..., pids: _Optional[_Iterable[int]] = ..., memory_bytes: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[Rank, _Mapping]]] = ..., detail: _Optional[str] = ..., num_running_answers: _Optional[int] = ..., num_waiting_answers: _Optional[int] = ..., num_free_blocks: _Optional[int] = ...) -> None: ...

class Rank(_message.Message):
    __slots__ = ("rank", "node", "pid", "device", "state", "detail", "fraction", "num_steps", "weights_bytes", "memory_bytes", "memory_limit_bytes", "busy_share")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUSY_SHARE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    node: str
    pid: int
    device: str
    state: RankState
    detail: str
    fraction: float
    num_steps: int
    weights_bytes: int
    memory_bytes: int
    memory_limit_bytes: int
    busy_share: float
    def __init__(self, rank: _Optional[int] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., device: _Optional[str] = ..., state: _Optional[_Union[RankState, str]] = ..., detail: _Optional[str] = ..., fraction: _Optional[float] = ..., num_steps: _Optional[int] = ..., weights_bytes: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., memory_limit_bytes: _Optional[int] = ..., busy_share: _Optional[float] = ...) -> None: ...

class AdaptModelRequest(_message.Message):
    __slots__ = ("model", "revision", "inputs", "targets", "loss", "optimizer", "learning_rate", "num_steps", "batch_rows", "seed", "new_model", "only")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NEW_MODEL_FIELD_NUMBER: _ClassVar[int]
    ONLY_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    inputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    targets: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    loss: Loss
    optimizer: Optimizer
    learning_rate: float
    num_steps: int
    batch_rows: int
    seed: int
    new_model: str
    only: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., targets: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., loss: _Optional[_Union[Loss, str]] = ..., optimizer: _Optional[_Union[Optimizer, str]] = ..., learning_rate: _Optional[float] = ..., num_steps: _Optional[int] = ..., batch_rows: _Optional[int] = ..., seed: _Optional[int] = ..., new_model: _Optional[str] = ..., only: _Optional[_Iterable[str]] = ...) -> None: ...

class AdaptModelResponse(_message.Message):
    __slots__ = ("state", "step", "num_steps", "loss", "detail", "adapted")
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    ADAPTED_FIELD_NUMBER: _ClassVar[int]
    state: AdaptationState
    step: int
    num_steps: int
    loss: float
    detail: str
    adapted: AdaptedModel
    def __init__(self, state: _Optional[_Union[AdaptationState, str]] = ..., step: _Optional[int] = ..., num_steps: _Optional[int] = ..., loss: _Optional[float] = ..., detail: _Optional[str] = ..., adapted: _Optional[_Union[AdaptedModel, _Mapping]] = ...) -> None: ...

class AdaptedModel(_message.Message):
    __slots__ = ("model", "revision", "path", "num_parameters")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    path: str
    num_parameters: int
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., path: _Optional[str] = ..., num_parameters: _Optional[int] = ...) -> None: ...

from tensorway.v1 import inference_pb2 as _inference_pb2
from tensorway.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OpenRequest(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: bytes
    def __init__(self, frames: _Optional[bytes] = ...) -> None: ...

class OpenResponse(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: bytes
    def __init__(self, frames: _Optional[bytes] = ...) -> None: ...

class TensorHead(_message.Message):
    __slots__ = ("name", "dtype", "shape", "num_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: _tensor_pb2.DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    num_bytes: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class RequestHead(_message.Message):
    __slots__ = ("request_id", "model", "revision", "rows", "priority", "inputs", "output_names", "parameters", "traceparent", "explain", "generate", "so_far", "stream_id", "next_sequence", "seed", "idempotency_key")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Parameter
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Parameter, _Mapping]] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_NAMES_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    SO_FAR_FIELD_NUMBER: _ClassVar[int]
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    revision: str
    rows: int
    priority: int
    inputs: _containers.RepeatedCompositeFieldContainer[TensorHead]
    output_names: _containers.RepeatedScalarFieldContainer[str]
    parameters: _containers.MessageMap[str, _tensor_pb2.Parameter]
    traceparent: str
    explain: _inference_pb2.ExplainOptions
    generate: _inference_pb2.GenerateRequest
    so_far: _containers.RepeatedCompositeFieldContainer[GenerationSoFar]
    stream_id: str
    next_sequence: int
    seed: int
    idempotency_key: str
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., revision: _Optional[str] = ..., rows: _Optional[int] = ..., priority: _Optional[int] = ..., inputs: _Optional[_Iterable[_Union[TensorHead, _Mapping]]] = ..., output_names: _Optional[_Iterable[str]] = ..., parameters: _Optional[_Mapping[str, _tensor_pb2.Parameter]] = ..., traceparent: _Optional[str] = ..., explain: _Optional[_Union[_inference_pb2.ExplainOptions, _Mapping]] = ..., generate: _Optional[_Union[_inference_pb2.GenerateRequest, _Mapping]] = ..., so_far: _Optional[_Iterable[_Union[GenerationSoFar, _Mapping]]] = ..., stream_id: _Optional[str] = ..., next_sequence: _Optional[int] = ..., seed: _Optional[int] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class GenerationSoFar(_message.Message):
    __slots__ = ("token_ids", "has_prompt", "is_finished")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    HAS_PROMPT_FIELD_NUMBER: _ClassVar[int]
    IS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    has_prompt: bool
    is_finished: bool
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., has_prompt: _Optional[bool] = ..., is_finished: _Optional[bool] = ...) -> None: ...

class GenerationAttempt(_message.Message):
    __slots__ = ("choice", "seed", "so_far", "num_attempts")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SO_FAR_FIELD_NUMBER: _ClassVar[int]
    NUM_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    choice: int
    seed: int
    so_far: GenerationSoFar
    num_attempts: int
    def __init__(self, choice: _Optional[int] = ..., seed: _Optional[int] = ..., so_far: _Optional[_Union[GenerationSoFar, _Mapping]] = ..., num_attempts: _Optional[int] = ...) -> None: ...

class ResponseHead(_message.Message):
    __slots__ = ("outputs", "parameters")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Parameter
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Parameter, _Mapping]] = ...) -> None: ...
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[TensorHead]
    parameters: _containers.MessageMap[str, _tensor_pb2.Parameter]
    def __init__(self, outputs: _Optional[_Iterable[_Union[TensorHead, _Mapping]]] = ..., parameters: _Optional[_Mapping[str, _tensor_pb2.Parameter]] = ...) -> None: ...

class ReplyHead(_message.Message):
    __slots__ = ("response", "revision", "timing", "model")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    response: bytes
    revision: str
    timing: Timing
    model: str
    def __init__(self, response: _Optional[bytes] = ..., revision: _Optional[str] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., model: _Optional[str] = ...) -> None: ...

class BatchHead(_message.Message):
    __slots__ = ("batch_id", "epoch", "requests", "remaining_us", "generation")
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    REMAINING_US_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    batch_id: int
    epoch: int
    requests: _containers.RepeatedScalarFieldContainer[bytes]
    remaining_us: _containers.RepeatedScalarFieldContainer[int]
    generation: GenerationAttempt
    def __init__(self, batch_id: _Optional[int] = ..., epoch: _Optional[int] = ..., requests: _Optional[_Iterable[bytes]] = ..., remaining_us: _Optional[_Iterable[int]] = ..., generation: _Optional[_Union[GenerationAttempt, _Mapping]] = ...) -> None: ...

class BatchReplyHead(_message.Message):
    __slots__ = ("results", "wait_us", "step_us", "prepare_us")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    WAIT_US_FIELD_NUMBER: _ClassVar[int]
    STEP_US_FIELD_NUMBER: _ClassVar[int]
    PREPARE_US_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Result]
    wait_us: int
    step_us: int
    prepare_us: int
    def __init__(self, results: _Optional[_Iterable[_Union[Result, _Mapping]]] = ..., wait_us: _Optional[int] = ..., step_us: _Optional[int] = ..., prepare_us: _Optional[int] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("response", "error", "body_bytes")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    BODY_BYTES_FIELD_NUMBER: _ClassVar[int]
    response: bytes
    error: ErrorDetail
    body_bytes: int
    def __init__(self, response: _Optional[bytes] = ..., error: _Optional[_Union[ErrorDetail, _Mapping]] = ..., body_bytes: _Optional[int] = ...) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("reason", "status", "message", "field", "hop", "retry_after_us")
    REASON_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    HOP_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_US_FIELD_NUMBER: _ClassVar[int]
    reason: str
    status: int
    message: str
    field: str
    hop: str
    retry_after_us: int
    def __init__(self, reason: _Optional[str] = ..., status: _Optional[int] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., hop: _Optional[str] = ..., retry_after_us: _Optional[int] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_us", "group_us", "wait_us", "step_us", "prepare_us", "batch_rows", "batch_requests", "is_first_in_batch", "num_attempts", "group", "num_hedges")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    GROUP_US_FIELD_NUMBER: _ClassVar[int]
    WAIT_US_FIELD_NUMBER: _ClassVar[int]
    STEP_US_FIELD_NUMBER: _ClassVar[int]
    PREPARE_US_FIELD_NUMBER: _ClassVar[int]
    BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    BATCH_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    IS_FIRST_IN_BATCH_FIELD_NUMBER: _ClassVar[int]
    NUM_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    NUM_HEDGES_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    group_us: int
    wait_us: int
    step_us: int
    prepare_us: int
    batch_rows: int
    batch_requests: int
    is_first_in_batch: bool
    num_attempts: int
    group: str
    num_hedges: int
    def __init__(self, queue_us: _Optional[int] = ..., group_us: _Optional[int] = ..., wait_us: _Optional[int] = ..., step_us: _Optional[int] = ..., prepare_us: _Optional[int] = ..., batch_rows: _Optional[int] = ..., batch_requests: _Optional[int] = ..., is_first_in_batch: _Optional[bool] = ..., num_attempts: _Optional[int] = ..., group: _Optional[str] = ..., num_hedges: _Optional[int] = ...) -> None: ...

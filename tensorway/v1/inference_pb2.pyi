from tensorway.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExplainMethod(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXPLAIN_METHOD_UNSPECIFIED: _ClassVar[ExplainMethod]
    EXPLAIN_METHOD_SALIENCY: _ClassVar[ExplainMethod]
    EXPLAIN_METHOD_INPUT_X_GRADIENT: _ClassVar[ExplainMethod]
    EXPLAIN_METHOD_INTEGRATED_GRADIENTS: _ClassVar[ExplainMethod]

class Differentiation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DIFFERENTIATION_UNSPECIFIED: _ClassVar[Differentiation]
    DIFFERENTIATION_VJP: _ClassVar[Differentiation]
    DIFFERENTIATION_DIST_AUTOGRAD: _ClassVar[Differentiation]
EXPLAIN_METHOD_UNSPECIFIED: ExplainMethod
EXPLAIN_METHOD_SALIENCY: ExplainMethod
EXPLAIN_METHOD_INPUT_X_GRADIENT: ExplainMethod
EXPLAIN_METHOD_INTEGRATED_GRADIENTS: ExplainMethod
DIFFERENTIATION_UNSPECIFIED: Differentiation
DIFFERENTIATION_VJP: Differentiation
DIFFERENTIATION_DIST_AUTOGRAD: Differentiation

class InferRequest(_message.Message):
    __slots__ = ("model", "revision", "request_id", "inputs", "output_names", "parameters", "priority")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Parameter
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Parameter, _Mapping]] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_NAMES_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    request_id: str
    inputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    output_names: _containers.RepeatedScalarFieldContainer[str]
    parameters: _containers.MessageMap[str, _tensor_pb2.Parameter]
    priority: int
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., request_id: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., output_names: _Optional[_Iterable[str]] = ..., parameters: _Optional[_Mapping[str, _tensor_pb2.Parameter]] = ..., priority: _Optional[int] = ...) -> None: ...

class InferResponse(_message.Message):
    __slots__ = ("model", "revision", "request_id", "outputs", "parameters")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Parameter
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Parameter, _Mapping]] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    request_id: str
    outputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    parameters: _containers.MessageMap[str, _tensor_pb2.Parameter]
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., request_id: _Optional[str] = ..., outputs: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., parameters: _Optional[_Mapping[str, _tensor_pb2.Parameter]] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("model", "revision", "request_id", "inputs", "parameters", "priority", "options")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Parameter
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Parameter, _Mapping]] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    request_id: str
    inputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    parameters: _containers.MessageMap[str, _tensor_pb2.Parameter]
    priority: int
    options: ExplainOptions
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., request_id: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., parameters: _Optional[_Mapping[str, _tensor_pb2.Parameter]] = ..., priority: _Optional[int] = ..., options: _Optional[_Union[ExplainOptions, _Mapping]] = ...) -> None: ...

class ExplainOptions(_message.Message):
    __slots__ = ("method", "input", "target", "num_points", "baseline", "differentiation")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    NUM_POINTS_FIELD_NUMBER: _ClassVar[int]
    BASELINE_FIELD_NUMBER: _ClassVar[int]
    DIFFERENTIATION_FIELD_NUMBER: _ClassVar[int]
    method: ExplainMethod
    input: str
    target: ExplainTarget
    num_points: int
    baseline: float
    differentiation: Differentiation
    def __init__(self, method: _Optional[_Union[ExplainMethod, str]] = ..., input: _Optional[str] = ..., target: _Optional[_Union[ExplainTarget, _Mapping]] = ..., num_points: _Optional[int] = ..., baseline: _Optional[float] = ..., differentiation: _Optional[_Union[Differentiation, str]] = ...) -> None: ...

class ExplainTarget(_message.Message):
    __slots__ = ("output", "index", "weights")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    output: str
    index: _containers.RepeatedScalarFieldContainer[int]
    weights: _tensor_pb2.Tensor
    def __init__(self, output: _Optional[str] = ..., index: _Optional[_Iterable[int]] = ..., weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("model", "revision", "request_id", "outputs", "parameters")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Parameter
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Parameter, _Mapping]] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    request_id: str
    outputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    parameters: _containers.MessageMap[str, _tensor_pb2.Parameter]
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., request_id: _Optional[str] = ..., outputs: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., parameters: _Optional[_Mapping[str, _tensor_pb2.Parameter]] = ...) -> None: ...

from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetLogLevelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLogLevelResponse(_message.Message):
    __slots__ = ("level", "next_level", "next_in_seconds")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    NEXT_LEVEL_FIELD_NUMBER: _ClassVar[int]
    NEXT_IN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    level: str
    next_level: str
    next_in_seconds: float
    def __init__(self, level: _Optional[str] = ..., next_level: _Optional[str] = ..., next_in_seconds: _Optional[float] = ...) -> None: ...

class SetLogLevelRequest(_message.Message):
    __slots__ = ("level", "seconds")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    level: str
    seconds: float
    def __init__(self, level: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class SetLogLevelResponse(_message.Message):
    __slots__ = ("previous",)
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    previous: str
    def __init__(self, previous: _Optional[str] = ...) -> None: ...

class ProfileGroupRequest(_message.Message):
    __slots__ = ("options",)
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    options: ProfileOptions
    def __init__(self, options: _Optional[_Union[ProfileOptions, _Mapping]] = ...) -> None: ...

class ProfileOptions(_message.Message):
    __slots__ = ("num_steps", "max_seconds", "with_shapes", "with_memory", "with_stacks")
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WITH_SHAPES_FIELD_NUMBER: _ClassVar[int]
    WITH_MEMORY_FIELD_NUMBER: _ClassVar[int]
    WITH_STACKS_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    max_seconds: float
    with_shapes: bool
    with_memory: bool
    with_stacks: bool
    def __init__(self, num_steps: _Optional[int] = ..., max_seconds: _Optional[float] = ..., with_shapes: _Optional[bool] = ..., with_memory: _Optional[bool] = ..., with_stacks: _Optional[bool] = ...) -> None: ...

class ProfileGroupResponse(_message.Message):
    __slots__ = ("progress", "data")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    progress: ProfileProgress
    data: bytes
    def __init__(self, progress: _Optional[_Union[ProfileProgress, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ProfileProgress(_message.Message):
    __slots__ = ("group", "num_steps", "num_wanted", "state")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_WANTED_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    group: str
    num_steps: int
    num_wanted: int
    state: str
    def __init__(self, group: _Optional[str] = ..., num_steps: _Optional[int] = ..., num_wanted: _Optional[int] = ..., state: _Optional[str] = ...) -> None: ...

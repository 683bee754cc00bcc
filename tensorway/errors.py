"""Every error of the mesh, cut by who must act.

    TensorwayError
    ├── CallerError            the caller must change the request
    │   ├── InvalidRequest         INVALID_ARGUMENT     names the field
    │   ├── NotFound               NOT_FOUND
    │   ├── FailedPrecondition     FAILED_PRECONDITION
    │   ├── Unauthenticated        UNAUTHENTICATED
    │   ├── PermissionDenied       PERMISSION_DENIED
    │   ├── Unimplemented          UNIMPLEMENTED
    │   └── Cancelled              CANCELLED            the caller went away
    ├── Overloaded             RESOURCE_EXHAUSTED   the caller may come back after `retry_after_s`
    ├── MessageTooLarge        RESOURCE_EXHAUSTED   the caller must send less; retrying cannot help
    ├── OutOfMemory            RESOURCE_EXHAUSTED   the request does not fit the memory of a rank; send fewer rows
    ├── DeadlineExceeded       DEADLINE_EXCEEDED    names the hop that spent the time
    ├── Unavailable            UNAVAILABLE          a service or worker was lost; another attempt may succeed
    └── ModelError             the model's author must act
        ├── ModelFailed            INTERNAL             the model's own message; never retried
        └── InternalError          INTERNAL             a bug of Tensorway's own

`STATUS_OF` is the only table that maps an error to its gRPC status and says whether another attempt may help. Errors cross the mesh as
`ErrorDetail` (see `tensorway.v1`), and reach the client with google.rpc details.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar, Final, NamedTuple


class Status(IntEnum):
    """gRPC status codes (grpc/doc/statuscodes.md), here so that only the transport needs grpc itself."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class TensorwayError(Exception):
    """Root of the tree. `str(error)` is one clear sentence for a person."""

    #: Machine-readable reason, sent as google.rpc.ErrorInfo.reason.
    reason: ClassVar[str] = "UNKNOWN"

    def __init__(self, message: str, *, field: str = "", hop: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.hop = hop
        self.retry_after_s = retry_after_s

    @property
    def status(self) -> Status:
        return _row(type(self)).status

    @property
    def is_retryable(self) -> bool:
        return _row(type(self)).is_retryable


class CallerError(TensorwayError):
    """The caller must change the request."""


class InvalidRequest(CallerError):
    """The request breaks the model's signature or the protocol. `field` is the path of what is wrong, e.g. `inputs[0].shape`."""

    reason = "INVALID_REQUEST"


class NotFound(CallerError):
    """No such model, revision or method."""

    reason = "NOT_FOUND"


class FailedPrecondition(CallerError):
    """The request is well formed but the state of the mesh forbids it."""

    reason = "FAILED_PRECONDITION"


class Unauthenticated(CallerError):
    """The caller did not prove who it is."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(CallerError):
    """The caller may not do this."""

    reason = "PERMISSION_DENIED"


class Unimplemented(CallerError):
    """The method or feature does not exist here."""

    reason = "UNIMPLEMENTED"


class Cancelled(CallerError):
    """The caller withdrew the request."""

    reason = "CANCELLED"


class Overloaded(TensorwayError):
    """A queue or quota is full; `retry_after_s` says when to come back."""

    reason = "OVERLOADED"


class MessageTooLarge(TensorwayError):
    """A message exceeds the configured limit."""

    reason = "MESSAGE_TOO_LARGE"


class OutOfMemory(TensorwayError):
    """A request needs more memory than a rank has; smaller requests do not."""

    reason = "OUT_OF_MEMORY"


class DeadlineExceeded(TensorwayError):
    """The deadline passed or cannot be met; `hop` is the service that spent the time."""

    reason = "DEADLINE_EXCEEDED"


class Unavailable(TensorwayError):
    """A service, group or connection was lost before it answered."""

    reason = "UNAVAILABLE"


class ModelError(TensorwayError):
    """The model's author, or Tensorway's, must act."""


class ModelFailed(ModelError):
    """The model raised; the message is the model's own."""

    reason = "MODEL_FAILED"


class InternalError(ModelError):
    """A bug of Tensorway's own."""

    reason = "INTERNAL"


class ErrorStatus(NamedTuple):
    """A row of the table: the gRPC status, and whether another attempt may help."""

    status: Status
    is_retryable: bool


STATUS_OF: Final[dict[type[TensorwayError], ErrorStatus]] = {
    TensorwayError: ErrorStatus(Status.UNKNOWN, False),
    CallerError: ErrorStatus(Status.INVALID_ARGUMENT, False),
    InvalidRequest: ErrorStatus(Status.INVALID_ARGUMENT, False),
    NotFound: ErrorStatus(Status.NOT_FOUND, False),
    FailedPrecondition: ErrorStatus(Status.FAILED_PRECONDITION, False),
    Unauthenticated: ErrorStatus(Status.UNAUTHENTICATED, False),
    PermissionDenied: ErrorStatus(Status.PERMISSION_DENIED, False),
    Unimplemented: ErrorStatus(Status.UNIMPLEMENTED, False),
    Cancelled: ErrorStatus(Status.CANCELLED, False),
    Overloaded: ErrorStatus(Status.RESOURCE_EXHAUSTED, True),
    MessageTooLarge: ErrorStatus(Status.RESOURCE_EXHAUSTED, False),
    OutOfMemory: ErrorStatus(Status.RESOURCE_EXHAUSTED, False),
    DeadlineExceeded: ErrorStatus(Status.DEADLINE_EXCEEDED, False),
    Unavailable: ErrorStatus(Status.UNAVAILABLE, True),
    ModelError: ErrorStatus(Status.INTERNAL, False),
    ModelFailed: ErrorStatus(Status.INTERNAL, False),
    InternalError: ErrorStatus(Status.INTERNAL, False),
}


def _row(kind: type[TensorwayError]) -> ErrorStatus:
    """The row of `kind`; a service's own refinement of an error has its parent's."""
    return next(STATUS_OF[parent] for parent in kind.__mro__ if parent in STATUS_OF)


ERROR_OF_REASON: Final[dict[str, type[TensorwayError]]] = {
    error.reason: error for error in STATUS_OF if error.reason != TensorwayError.reason
}

ERROR_OF_STATUS: Final[dict[Status, type[TensorwayError]]] = {
    Status.INVALID_ARGUMENT: InvalidRequest,
    Status.NOT_FOUND: NotFound,
    Status.FAILED_PRECONDITION: FailedPrecondition,
    Status.UNAUTHENTICATED: Unauthenticated,
    Status.PERMISSION_DENIED: PermissionDenied,
    Status.UNIMPLEMENTED: Unimplemented,
    Status.CANCELLED: Cancelled,
    Status.RESOURCE_EXHAUSTED: Overloaded,
    Status.DEADLINE_EXCEEDED: DeadlineExceeded,
    Status.UNAVAILABLE: Unavailable,
}


def error_from(
    reason: str, status: int, message: str, *, field: str = "", hop: str = "", retry_after_s: float = 0.0
) -> TensorwayError:
    """The error a peer meant: by its reason where that is known, otherwise by its gRPC status."""
    kind = ERROR_OF_REASON.get(reason)
    if kind is None:
        known = Status(status) if status in Status._value2member_map_ else Status.UNKNOWN
        kind = ERROR_OF_STATUS.get(known, InternalError)
    return kind(message, field=field, hop=hop, retry_after_s=retry_after_s)


def as_tensorway_error(error: BaseException) -> TensorwayError:
    """`error` itself where it is one of ours, otherwise an `InternalError` that names it."""
    if isinstance(error, TensorwayError):
        return error
    return InternalError(f"{type(error).__name__}: {error}")

"""Errors as the head of an error frame, and back."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from tensorway.errors import InvalidRequest, TensorwayError, error_from
from tensorway.v1.link_pb2 import ErrorDetail


def encode_detail(error: TensorwayError) -> bytes:
    """A serialised `tensorway.v1.ErrorDetail`."""
    return ErrorDetail(
        reason=error.reason,
        status=int(error.status),
        message=error.message,
        field=error.field,
        hop=error.hop,
        retry_after_us=max(0, int(error.retry_after_s * 1e6)),
    ).SerializeToString()


def decode_detail(head: bytes) -> TensorwayError:
    """The error that a peer sent. Raises InvalidRequest where `head` is not an ErrorDetail."""
    try:
        detail = ErrorDetail.FromString(head)
    except DecodeError as error:
        raise InvalidRequest(f"not an ErrorDetail: {error}", field="head") from error
    return from_detail(detail)


def from_detail(detail: ErrorDetail) -> TensorwayError:
    """The error that a parsed ErrorDetail stands for."""
    return error_from(
        detail.reason, detail.status, detail.message, field=detail.field, hop=detail.hop, retry_after_s=detail.retry_after_us / 1e6
    )

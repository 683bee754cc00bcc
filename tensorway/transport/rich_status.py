"""Errors as gRPC shows them: a status code, one sentence, and google.rpc details in a trailer; and back again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status as RichStatus

from tensorway.errors import MessageTooLarge, Status, TensorwayError, Unavailable, error_from

DETAILS_TRAILER: Final = "grpc-status-details-bin"
DOMAIN: Final = "tensorway"

#: A sentence travels twice (percent-encoded, and inside the details), and all trailers together should stay below 8 KiB: grpc
#: starts to refuse them there.
MAX_SENTENCE_BYTES: Final = 1536

#: grpc core refuses an over-large message by itself, with no details: nothing but its sentence tells that apart from a server that is full.
_CORE_TOO_LARGE: Final = "message larger than max"

#: How grpc says that this side ended the RPC. Any other CANCELLED without details is core's, which ends so what meets a server's stop.
_ENDED_HERE: Final = ("Locally cancelled", "Channel closed")

_US_PER_S: Final = 1_000_000


class WireError(NamedTuple):
    """What goes into the trailers of a failed RPC."""

    code: int
    sentence: str
    details: bytes


def encode_error(error: TensorwayError) -> WireError:
    """`error` as status code, sentence and serialised google.rpc.Status."""
    sentence = shortened(error.message)
    rich = RichStatus(code=error.status, message=sentence)
    _add(rich, ErrorInfo(reason=error.reason, domain=DOMAIN, metadata={"hop": shortened(error.hop)} if error.hop else {}))
    if error.field:
        violation = BadRequest.FieldViolation(field=shortened(error.field), description=sentence if len(sentence) < 512 else "")
        _add(rich, BadRequest(field_violations=[violation]))
    if error.retry_after_s > 0.0:
        retry = RetryInfo()
        retry.retry_delay.FromMicroseconds(int(error.retry_after_s * _US_PER_S))
        _add(rich, retry)
    return WireError(int(error.status), sentence, rich.SerializeToString())


def decode_error(code: int, sentence: str, trailers: Mapping[str, str | bytes]) -> TensorwayError:
    """The error that a peer meant: by its details where they are ours and well formed, otherwise by its status alone."""
    details = trailers.get(DETAILS_TRAILER)
    rich = RichStatus()
    if isinstance(details, bytes):
        try:
            rich.ParseFromString(details)
        except DecodeError:
            # Another server's idea of details: the status and its sentence still say what happened.
            rich.Clear()
    reason, hop, field, retry_after_s = "", "", "", 0.0
    try:
        for detail in rich.details:
            info, bad, retry = ErrorInfo(), BadRequest(), RetryInfo()
            if detail.Unpack(info) and info.domain == DOMAIN:
                reason, hop = info.reason, info.metadata.get("hop", "")
            elif detail.Unpack(bad) and bad.field_violations:
                field = bad.field_violations[0].field
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToMicroseconds() / _US_PER_S
    except DecodeError:
        return error_from("", code, sentence)
    if not reason and code == Status.RESOURCE_EXHAUSTED and _CORE_TOO_LARGE in sentence:
        return MessageTooLarge(sentence)
    if not reason and code == Status.CANCELLED and not rich.message and not sentence.startswith(_ENDED_HERE):
        return Unavailable(f"the peer ended the call without an answer, as a server does that stops ({sentence or 'CANCELLED'})")
    message = rich.message or sentence or f"the peer answered {_name(code)} without a message"
    return error_from(reason, code, message, field=field, hop=hop, retry_after_s=retry_after_s)


def shortened(text: str) -> str:
    """`text`, cut where its UTF-8 would not fit into trailers."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= MAX_SENTENCE_BYTES:
        return text
    return f"{encoded[:MAX_SENTENCE_BYTES].decode('utf-8', 'ignore')}... ({len(encoded)} bytes in all)"


def _add(rich: RichStatus, detail: ErrorInfo | BadRequest | RetryInfo) -> None:
    packed = Any()
    packed.Pack(detail)
    rich.details.append(packed)


def _name(code: int) -> str:
    return Status(code).name if code in Status._value2member_map_ else str(code)

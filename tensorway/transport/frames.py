"""The frames of a link as bytes, and back. Pure but for the count of what came: no I/O, and no trust in anything that is read.

The layout is documented in protos/tensorway/v1/link.proto. A gRPC message of a link is `OpenRequest` or `OpenResponse`, both of which are
one bytes field: its tag and length are written and read here by hand, so that no payload byte is copied by a protobuf parser.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from struct import Struct
from typing import Final, NamedTuple

from tensorway.errors import InvalidRequest
from tensorway.transport.link_traffic import TRAFFIC

HEADER: Final = Struct("<BBHIIIQ")
HEADER_BYTES: Final = HEADER.size
#: A body above this travels as a first frame and chunk frames.
CHUNK_BYTES: Final = 1 << 20
#: Flag: more chunks of this payload follow.
MORE: Final = 1
MAX_ID: Final = (1 << 32) - 1

_FRAMES_TAG: Final = 0x0A
_MAX_VARINT_BYTES: Final = 5
_NO_BODY: Final = memoryview(b"")


class FrameKind(IntEnum):
    """Offset 0 of a frame's header."""

    REQUEST = 1
    RESPONSE = 2
    ERROR = 3
    CANCEL = 4
    CHUNK = 5
    TOKEN = 6
    CREDIT = 7
    GOAWAY = 8


REQUEST: Final = int(FrameKind.REQUEST)
RESPONSE: Final = int(FrameKind.RESPONSE)
ERROR: Final = int(FrameKind.ERROR)
CANCEL: Final = int(FrameKind.CANCEL)
CHUNK: Final = int(FrameKind.CHUNK)
TOKEN: Final = int(FrameKind.TOKEN)
CREDIT: Final = int(FrameKind.CREDIT)
GOAWAY: Final = int(FrameKind.GOAWAY)


class Frame(NamedTuple):
    """One frame. `body` is a view into the message it came in; `value` is the header's last field."""

    kind: int
    has_more: bool
    id: int
    head: bytes
    body: memoryview
    value: int


def message_prefix(num_bytes: int) -> bytes:
    """Tag and length before `num_bytes` of frames."""
    encoded = bytearray((_FRAMES_TAG,))
    while num_bytes > 0x7F:
        encoded.append(num_bytes & 0x7F | 0x80)
        num_bytes >>= 7
    encoded.append(num_bytes)
    return bytes(encoded)


def decode_message(message: bytes | bytearray) -> Iterator[Frame]:
    """The frames of one gRPC message, in order. Raises InvalidRequest at the first byte that breaks the layout."""
    end = len(message)
    if not end:
        return
    offset = _frames_offset(message)
    view = memoryview(message)
    unpack, new_frame = HEADER.unpack_from, tuple.__new__
    num_frames = 0
    while offset < end:
        num_frames += 1
        if end - offset < HEADER_BYTES:
            raise _broken(f"{end - offset} bytes are left where a {HEADER_BYTES}-byte header must start")
        kind, flags, zero, id, head_bytes, body_bytes, value = unpack(message, offset)
        head_at = offset + HEADER_BYTES
        body_at = head_at + head_bytes
        offset = body_at + body_bytes
        if offset > end:
            raise _broken(f"a frame claims {head_bytes} + {body_bytes} bytes, {end - head_at} are left")
        if kind == TOKEN and not (flags or zero or body_bytes or value):
            # The most frequent frame by far, in the fewest steps.
            yield new_frame(Frame, (TOKEN, False, id, bytes(message[head_at:body_at]), _NO_BODY, 0))
            continue
        if zero or flags > MORE or not REQUEST <= kind <= GOAWAY:
            raise _broken(f"a header has kind {kind}, flags {flags} and reserved bytes {zero}")
        if flags and kind not in (REQUEST, RESPONSE, CHUNK):
            raise _broken(f"a {FrameKind(kind).name.lower()} frame says that chunks follow")
        if value and kind not in (REQUEST, CREDIT):
            raise _broken(f"a {FrameKind(kind).name.lower()} frame carries the value {value}")
        if kind == TOKEN and body_bytes:
            raise _broken(f"a token frame carries {body_bytes} bytes of body")
        if kind == CREDIT and (head_bytes or body_bytes or not value):
            raise _broken(f"a credit frame grants {value} tokens and carries {head_bytes} + {body_bytes} bytes")
        yield Frame(kind, flags == MORE, id, bytes(view[head_at:body_at]), view[body_at:offset], value)
    TRAFFIC.took(num_frames, end)


def _frames_offset(message: bytes | bytearray) -> int:
    """Where the frames of a message that is not empty start."""
    if message[0] != _FRAMES_TAG:
        raise _broken("the message is not an OpenRequest or OpenResponse")
    length = shift = 0
    for offset in range(1, min(len(message), 1 + _MAX_VARINT_BYTES)):
        byte = message[offset]
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            if length != len(message) - offset - 1:
                raise _broken(f"the message claims {length} bytes of frames and holds {len(message) - offset - 1}")
            return offset + 1
        shift += 7
    raise _broken("the length of the frames is not a varint")


def _broken(why: str) -> InvalidRequest:
    return InvalidRequest(f"not a link's message: {why}", field="frames")

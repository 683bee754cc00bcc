"""The codec of a link: what goes in comes out, and nothing hostile gets through."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.deadline import Deadline
from tensorway.errors import InvalidRequest
from tensorway.transport.frames import (
    CANCEL,
    CHUNK,
    CHUNK_BYTES,
    CREDIT,
    ERROR,
    GOAWAY,
    HEADER,
    MORE,
    REQUEST,
    RESPONSE,
    TOKEN,
    Frame,
    decode_message,
    message_prefix,
)
from tensorway.transport.link_inbox import MAX_UNFINISHED, Inbox
from tensorway.transport.link_outbox import FULL_MESSAGE_BYTES, Outbox, Progress
from tensorway.v1.link_pb2 import OpenRequest

_ids = st.integers(0, 2**32 - 1)
_segments = st.lists(st.binary(max_size=200), max_size=4).map(tuple)


def frame(kind: int, id: int = 1, head: bytes = b"", body: bytes = b"", flags: int = 0, value: int = 0, zero: int = 0) -> bytes:
    return HEADER.pack(kind, flags, zero, id, len(head), len(body), value) + head + body


def message(frames: bytes) -> bytes:
    return message_prefix(len(frames)) + frames


@given(st.lists(st.tuples(st.sampled_from((REQUEST, RESPONSE, ERROR)), _ids, st.binary(max_size=50), _segments), min_size=1, max_size=20))
def test_what_is_offered_is_decoded(offers: list[tuple[int, int, bytes, tuple[bytes, ...]]]) -> None:
    outbox = Outbox()
    for kind, id, head, payload in offers:
        outbox.offer(kind, id, head, payload)
    packed = outbox.take()
    assert packed is not None
    assert outbox.take() is None
    assert outbox.num_bytes == 0
    assert not outbox
    decoded = [(found.kind, found.id, found.head, bytes(found.body)) for found in decode_message(packed)]
    assert decoded == [(kind, id, head, b"".join(payload)) for kind, id, head, payload in offers]


@given(st.binary(max_size=2000))
def test_the_message_is_the_documented_protobuf(frames: bytes) -> None:
    assert OpenRequest.FromString(message(frames)).frames == frames
    if frames:
        assert message(frames) == OpenRequest(frames=frames).SerializeToString()


@given(st.binary(max_size=300))
def test_hostile_bytes_are_decoded_or_refused(noise: bytes) -> None:
    for hostile in (noise, message(noise), message(frame(REQUEST, body=b"x") + noise)):
        with contextlib.suppress(InvalidRequest):
            for found in decode_message(hostile):
                assert len(found.head) + len(found.body) <= len(hostile)


@given(st.data())
def test_one_flipped_byte_never_escapes_the_message(data: st.DataObject) -> None:
    good = bytearray(message(frame(REQUEST, 7, b"head", b"body", value=5) + frame(CANCEL, 7)))
    good[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(InvalidRequest):
        assert sum(len(found.head) + len(found.body) for found in decode_message(bytes(good))) <= len(good)


@pytest.mark.parametrize(
    "hostile",
    [
        b"\x12\x00",
        b"\x0a",
        b"\x0a\x80",
        b"\x0a\xff\xff\xff\xff\xff\x01",
        b"\x0a\x05abc",
        message(b"short"),
        message(frame(0)),
        message(frame(9)),
        message(frame(REQUEST, zero=1)),
        message(frame(REQUEST, flags=2)),
        message(frame(CANCEL, flags=MORE)),
        message(frame(RESPONSE, value=1)),
        message(HEADER.pack(REQUEST, 0, 0, 1, 2**32 - 1, 2**32 - 1, 0)),
        message(frame(REQUEST, body=b"x")[:-1]),
        message(frame(TOKEN, head=b"h", body=b"x")),
        message(frame(TOKEN, head=b"h", value=1)),
        message(frame(TOKEN, head=b"h", flags=MORE)),
        message(frame(CREDIT)),
        message(frame(CREDIT, head=b"h", value=1)),
        message(frame(CREDIT, body=b"x", value=1)),
        message(frame(CREDIT, flags=MORE, value=1)),
    ],
)
def test_each_broken_layout_is_refused(hostile: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not a link's message"):
        list(decode_message(hostile))


_tokens = st.tuples(st.just(TOKEN), _ids, st.binary(max_size=50), st.just(0))
_credits = st.tuples(st.just(CREDIT), _ids, st.just(b""), st.integers(1, 2**64 - 1))


@given(st.lists(_tokens | _credits, min_size=1, max_size=30))
def test_tokens_and_credit_are_decoded_in_order(offers: list[tuple[int, int, bytes, int]]) -> None:
    outbox = Outbox()
    for kind, id, head, value in offers:
        outbox.offer(kind, id, head, value=value)
    decoded = [(found.kind, found.id, found.head, found.value) for found in decode_message(outbox.take() or b"")]
    assert decoded == offers
    assert outbox.num_bytes == 0


def test_an_empty_message_holds_no_frames_and_a_body_is_not_copied() -> None:
    assert list(decode_message(b"")) == []
    packed = message(frame(REQUEST, 1, b"h", b"body") + frame(CREDIT, 2, value=3))
    request, credit = decode_message(packed)
    assert request.body.obj is packed
    assert credit.value == 3


def test_the_deadline_is_stamped_when_the_frame_leaves() -> None:
    outbox = Outbox()
    outbox.offer(REQUEST, 1, b"", (), Deadline.after(100.0))
    outbox.offer(REQUEST, 2, b"", (), Deadline.after(-1.0))
    outbox.offer(GOAWAY, 0)
    first, second, third = decode_message(outbox.take() or b"")
    assert 90e6 < first.value <= 100e6
    assert second.value == 1
    assert third.value == 0


@given(st.lists(st.binary(min_size=1, max_size=5000), min_size=1, max_size=8), st.integers(0, 3))
def test_large_payloads_are_chunked_and_put_together_again(pieces: list[bytes], num_small: int) -> None:
    payload = tuple(piece * 700 for piece in pieces)
    outbox, inbox = Outbox(), Inbox(1 << 30)
    outbox.offer(REQUEST, 1, b"head", payload, Deadline.after(60.0))
    for number in range(num_small):
        outbox.offer(REQUEST, 10 + number, b"", (b"small",))
    whole: list[bytes] = []
    small = 0
    while (packed := outbox.take()) is not None:
        assert len(packed) <= FULL_MESSAGE_BYTES + CHUNK_BYTES + 8192
        for found in decode_message(packed):
            if found.id != 1:
                small += 1
            elif found.kind == REQUEST and not found.has_more:
                whole.append(bytes(found.body))
            elif found.kind == REQUEST:
                inbox.begin(found)
            elif (arrival := inbox.add(found)) is not None:
                assert arrival.payload is not None
                assert arrival.first.head == b"head"
                whole.append(b"".join(arrival.payload))
    assert whole == [b"".join(payload)]
    assert small == num_small
    assert outbox.num_bytes == 0


def test_small_frames_do_not_wait_for_a_large_payload_and_large_ones_take_turns() -> None:
    outbox = Outbox()
    outbox.offer(REQUEST, 1, b"", (bytes(5 * CHUNK_BYTES),))
    outbox.offer(REQUEST, 2, b"", (bytes(5 * CHUNK_BYTES),))
    assert [found.id for found in decode_message(outbox.take() or b"")] == [1]
    outbox.offer(REQUEST, 3, b"", (b"small",))
    assert [found.id for found in decode_message(outbox.take() or b"")] == [3, 2]
    turns = [found.id for _ in range(4) for found in decode_message(outbox.take() or b"")]
    assert turns == [1, 2, 1, 2]


def test_withdrawing_tells_what_the_peer_has_heard() -> None:
    outbox = Outbox()
    outbox.offer(REQUEST, 1, b"", (b"small",))
    assert outbox.withdraw(1) is Progress.UNSENT
    outbox.offer(REQUEST, 2, b"", (bytes(3 * CHUNK_BYTES),))
    assert outbox.take() is not None
    assert outbox.withdraw(2) is Progress.PARTIAL
    assert outbox.withdraw(2) is Progress.LEFT
    assert outbox.num_bytes == 0
    assert outbox.take() is None


def test_withdrawn_tokens_and_credit_say_nothing_of_the_request_beside_them() -> None:
    outbox = Outbox()
    outbox.offer(CREDIT, 1, value=4)
    assert outbox.withdraw(1) is Progress.LEFT
    outbox.offer(REQUEST, 1, b"", (b"small",))
    outbox.offer(CREDIT, 1, value=4)
    assert outbox.withdraw(1) is Progress.UNSENT
    for kind, payload in ((TOKEN, ()), (RESPONSE, (bytes(3 * CHUNK_BYTES),))):
        outbox.offer(kind, 2, b"", payload)
    outbox.take()
    outbox.offer(TOKEN, 2, b"late")
    assert outbox.withdraw(2) is Progress.PARTIAL
    assert outbox.num_bytes == 0
    assert outbox.take() is None


def test_a_reply_never_overtakes_the_tokens_before_it() -> None:
    outbox = Outbox()
    for _ in range(100):
        outbox.offer(TOKEN, 1, bytes(50_000))
    outbox.offer(RESPONSE, 1, b"", (bytes(3 * CHUNK_BYTES),))
    kinds: list[int] = []
    while (packed := outbox.take()) is not None:
        kinds += [found.kind for found in decode_message(packed)]
    assert kinds == [TOKEN] * 100 + [RESPONSE, CHUNK, CHUNK]


def _chunk(id: int, size: int, has_more: bool, kind: int = CHUNK) -> Frame:
    return Frame(kind, has_more, id, b"", memoryview(bytes(size)), 0)


def test_an_unfinished_payload_is_bounded() -> None:
    inbox = Inbox(100)
    inbox.begin(_chunk(1, 60, True, REQUEST))
    arrival = inbox.add(_chunk(1, 60, True))
    assert arrival is not None
    assert arrival.payload is None
    assert inbox.num_bytes == 0
    assert inbox.add(_chunk(1, 60, True)) is None
    assert inbox.num_bytes == 0
    assert inbox.add(_chunk(1, 60, False)) is None
    with pytest.raises(InvalidRequest, match="nothing is expected"):
        inbox.add(_chunk(1, 60, False))


def test_ids_of_unfinished_payloads_are_checked() -> None:
    inbox = Inbox(100)
    inbox.begin(_chunk(1, 1, True, REQUEST))
    with pytest.raises(InvalidRequest, match="used twice"):
        inbox.begin(_chunk(1, 1, True, REQUEST))
    inbox.drop(1, is_cancelled=False)
    assert inbox.add(_chunk(1, 1, False)) is None
    for id in range(MAX_UNFINISHED):
        inbox.begin(_chunk(id, 1, True, REQUEST))
    with pytest.raises(InvalidRequest, match="unfinished"):
        inbox.begin(_chunk(MAX_UNFINISHED, 1, True, REQUEST))
    inbox.drop(0, is_cancelled=True)
    inbox.begin(_chunk(MAX_UNFINISHED, 1, True, REQUEST))

"""Errors cross the wire and come back as themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.errors import (
    ERROR_OF_REASON,
    Cancelled,
    InternalError,
    InvalidRequest,
    MessageTooLarge,
    Overloaded,
    Status,
    TensorwayError,
    Unavailable,
)
from tensorway.transport.error_detail import decode_detail, encode_detail
from tensorway.transport.rich_status import DETAILS_TRAILER, MAX_SENTENCE_BYTES, decode_error, encode_error

_KINDS = st.sampled_from(sorted(ERROR_OF_REASON.values(), key=lambda kind: kind.__name__))
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
_SECONDS = st.integers(0, 10_000_000).map(lambda us: us / 1e6)


@given(_KINDS, _TEXT.filter(bool), _TEXT, _TEXT, _SECONDS)
def test_both_codecs_return_the_error_they_were_given(
    kind: type[TensorwayError], message: str, field: str, hop: str, retry_after_s: float
) -> None:
    error = kind(message, field=field, hop=hop, retry_after_s=retry_after_s)
    wire = encode_error(error)
    for back in (decode_error(wire.code, wire.sentence, {DETAILS_TRAILER: wire.details}), decode_detail(encode_detail(error))):
        assert type(back) is kind
        assert (back.message, back.field, back.hop) == (message, field, hop)
        assert back.retry_after_s == pytest.approx(retry_after_s, abs=2e-6)


@given(st.text(max_size=4000))
def test_trailers_stay_small(message: str) -> None:
    wire = encode_error(InvalidRequest(message, field=message, hop=message))
    assert len(wire.sentence.encode("utf-8", "replace")) <= MAX_SENTENCE_BYTES + 40
    assert len(wire.details) < 8192


def test_without_our_details_the_status_decides() -> None:
    assert type(decode_error(Status.UNAVAILABLE, "gone", {})) is Unavailable
    assert type(decode_error(Status.UNAVAILABLE, "gone", {DETAILS_TRAILER: b"\xff\xff not protobuf"})) is Unavailable
    assert type(decode_error(Status.DATA_LOSS, "", {})) is InternalError
    assert type(decode_error(999, "odd", {})) is InternalError
    # Core ends so what reaches a server that stops: it can be asked again. Who cancels here, or is told so by a service, means it.
    assert type(decode_error(Status.CANCELLED, "CANCELLED", {})) is Unavailable
    assert type(decode_error(Status.CANCELLED, "Locally cancelled by application!", {})) is Cancelled
    assert type(decode_error(Status.CANCELLED, "", {DETAILS_TRAILER: encode_error(Cancelled("gone")).details})) is Cancelled
    assert type(decode_error(Status.RESOURCE_EXHAUSTED, "quota", {})) is Overloaded
    assert type(decode_error(Status.RESOURCE_EXHAUSTED, "CLIENT: Received message larger than max (9 vs. 5)", {})) is MessageTooLarge


def test_details_of_another_domain_are_not_ours() -> None:
    wire = encode_error(Overloaded("full"))
    foreign = wire.details.replace(b"tensorway", b"elsewhere"[:9])
    assert type(decode_error(Status.NOT_FOUND, "x", {DETAILS_TRAILER: foreign})).reason == "NOT_FOUND"


def test_a_broken_detail_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="ErrorDetail"):
        decode_detail(b"\xff\xff\xff")

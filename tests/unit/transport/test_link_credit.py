"""The credit ledger: whatever is granted and taken, no more tokens are ever on their way than the credit allows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.errors import InternalError, InvalidRequest
from tensorway.transport.link_credit import CreditLedger
from tensorway.transport.port import TOKEN_CREDIT


class _Reader:
    def on_token(self, head: bytes) -> None: ...


@given(st.lists(st.tuples(st.sampled_from(("token", "grant", "leave")), st.integers(0, 2)), max_size=200))
def test_the_peer_never_gets_more_than_the_credit(moves: list[tuple[str, int]]) -> None:
    ledger, reader = CreditLedger(), _Reader()
    at_peer, held = [TOKEN_CREDIT] * 3, [0] * 3
    for move, id in moves:
        if move == "token" and at_peer[id]:
            assert ledger.take(id, reader) == reader.on_token
            at_peer[id] -= 1
            held[id] += 1
        elif move == "token":
            with pytest.raises(InvalidRequest, match="more tokens than were granted"):
                ledger.take(id, reader)
        elif move == "grant" and held[id]:
            held[id] -= 1
            is_due = ledger.grant(id, 1)
            gathered = TOKEN_CREDIT - at_peer[id] - held[id]
            assert is_due is (gathered >= TOKEN_CREDIT // 2)
        elif move == "leave":
            for granted, num_tokens in ledger.gathered():
                at_peer[granted] += num_tokens
            assert list(ledger.gathered()) == []
        assert all(0 <= there + here <= TOKEN_CREDIT for there, here in zip(at_peer, held, strict=True))
    # In the end everything that was granted has left.
    for granted, num_tokens in ledger.gathered():
        at_peer[granted] += num_tokens
    assert [there + here for there, here in zip(at_peer, held, strict=True)] == [TOKEN_CREDIT] * 3


def test_more_than_was_received_is_refused_and_the_unknown_ignored() -> None:
    ledger = CreditLedger()
    assert ledger.grant(1, 5) is False
    ledger.take(1, _Reader())
    for wrong in (-1, 2):
        with pytest.raises(InternalError, match="granted"):
            ledger.grant(1, wrong)
    assert ledger.grant(1, 0) is False
    assert list(ledger.gathered()) == []
    assert ledger.grant(1, 1) is False
    ledger.forget(1)
    assert list(ledger.gathered()) == []
    with pytest.raises(InvalidRequest, match="not answered with tokens"):
        ledger.take(2, object())

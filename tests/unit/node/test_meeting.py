"""The meeting of an epoch's ranks, with a clock of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.errors import InvalidRequest
from tensorway_worker.meeting import Meeting, Operation


@dataclass
class Alarm:
    """A call that is due at an instant."""

    at_s: float
    call: Callable[[], None]
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True


@dataclass
class Clock:
    """Time that passes when told to."""

    now_s: float = 0.0
    alarms: list[Alarm] = field(default_factory=list)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Alarm:
        self.alarms.append(Alarm(self.now_s + delay_s, call))
        return self.alarms[-1]

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds
        due = [alarm for alarm in self.alarms if alarm.at_s <= self.now_s]
        self.alarms = [alarm for alarm in self.alarms if alarm.at_s > self.now_s]
        for alarm in due:
            if not alarm.is_cancelled:
                alarm.call()


@dataclass
class Visitor:
    """Asks, and keeps the answers by operation."""

    meeting: Meeting
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    last_id: int = 0

    def ask(self, op: str, *keys: str, values: tuple[bytes, ...] = (), amount: int = 0, timeout_s: float = 10.0) -> int:
        self.last_id += 1
        self.meeting.take(Operation(self.last_id, op, keys, values, amount, timeout_s).to_line(), self._answer)
        return self.last_id

    def _answer(self, line: bytes) -> None:
        assert line.endswith(b"\n")
        answer = json.loads(line)
        assert answer["id"] not in self.answers, "answered twice"
        self.answers[answer["id"]] = answer


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def visitor(clock: Clock) -> Visitor:
    return Visitor(Meeting(clock.call_later, max_keys=4, max_bytes=100))


def test_who_waits_is_answered_when_the_last_key_comes(visitor: Visitor) -> None:
    waiting = visitor.ask("wait", "a", "b")
    got = visitor.ask("get", "b")
    visitor.ask("set", "a", values=(b"x",))
    assert waiting not in visitor.answers
    visitor.ask("set", "b", values=(b"y",))
    assert "error" not in visitor.answers[waiting]
    assert visitor.answers[got]["values"] == ["eQ=="]


def test_who_waits_in_vain_reads_which_keys_are_missing(visitor: Visitor, clock: Clock) -> None:
    waiting = visitor.ask("wait", "a", "b", "c", timeout_s=5.0)
    visitor.ask("set", "b", values=(b"",))
    clock.pass_s(4.9)
    assert waiting not in visitor.answers
    clock.pass_s(0.2)
    assert visitor.answers[waiting]["error"] == "waited 5.0 s in vain for a, c"
    visitor.ask("set", "a", values=(b"",))
    visitor.ask("set", "c", values=(b"",))


def test_a_key_that_is_deleted_is_waited_for_again(visitor: Visitor) -> None:
    waiting = visitor.ask("multi_get", "a", "b")
    visitor.ask("set", "a", values=(b"1",))
    visitor.ask("delete_key", "a")
    visitor.ask("set", "b", values=(b"2",))
    assert waiting not in visitor.answers
    visitor.ask("set", "a", values=(b"3",))
    assert visitor.answers[waiting]["values"] == ["Mw==", "Mg=="]


def test_it_is_bounded(visitor: Visitor) -> None:
    for key in "abcd":
        visitor.ask("set", key, values=(b"",))
    fifth = visitor.ask("set", "e", values=(b"",))
    assert "full: it holds 4 keys" in visitor.answers[fifth]["error"]
    large = visitor.ask("set", "a", values=(b"x" * 97,))
    assert "more than 100 bytes" in visitor.answers[large]["error"]
    visitor.ask("delete_key", "d")
    fits = visitor.ask("set", "a", values=(b"x" * 97,))
    assert "error" not in visitor.answers[fits]
    grows = visitor.ask("append", "a", values=(b"x",))
    assert "full" in visitor.answers[grows]["error"]


def test_its_end_answers_everybody(visitor: Visitor, clock: Clock) -> None:
    visitor.ask("set", "a", values=(b"1",))
    waiting = visitor.ask("get", "b")
    visitor.meeting.end("the epoch is over")
    after = visitor.ask("get", "a")
    assert visitor.answers[waiting]["error"] == visitor.answers[after]["error"] == "the epoch is over"
    clock.pass_s(100)
    assert visitor.meeting.num_waiting == 0


@pytest.mark.parametrize(
    ("op", "values", "words"),
    [
        ("fly", (), "no such operation"), ("set", (), "set:"), ("compare_set", (b"1",), "compare_set:"),
        ("multi_set", (b"1", b"2"), "multi_set:"),
    ],
)
def test_what_is_no_whole_operation_is_refused(visitor: Visitor, op: str, values: tuple[bytes, ...], words: str) -> None:
    assert words in visitor.answers[visitor.ask(op, "a", values=values)]["error"]


@pytest.mark.parametrize(
    "line", [b"", b"[]", b"{}", b"1", b'{"id": 1}', b'{"id": "x", "op": "get"}', b'{"id": 1, "op": "set", "values": ["?"]}']
)
def test_a_line_that_is_none_raises(visitor: Visitor, line: bytes) -> None:
    with pytest.raises(InvalidRequest, match="no operation"):
        visitor.meeting.take(line, visitor._answer)


KEYS = st.sampled_from("abcde")


@given(st.lists(st.tuples(st.sampled_from(["set", "get", "wait", "delete_key", "append", "add", "check"]), KEYS, st.binary(max_size=40))))
def test_every_operation_is_answered_exactly_once_whatever_comes(operations: list[tuple[str, str, bytes]]) -> None:
    clock = Clock()
    visitor = Visitor(Meeting(clock.call_later, max_keys=4, max_bytes=100))
    for op, key, value in operations:
        visitor.ask(op, key, values=(value,), amount=1)
    clock.pass_s(60)
    assert visitor.answers.keys() == set(range(1, visitor.last_id + 1))
    held = visitor.meeting
    assert held._num_bytes == sum(len(key) + len(value) for key, value in held._values.items()) <= 100

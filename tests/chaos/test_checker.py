"""The checker can fail: whatever is wrong with a request shows in the figures, and misses its aim."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tensorway.errors import Status
from tensorway.results import Delta, Finished
from tests.chaos.checker import Aims, Verdict, Window, judge
from tests.chaos.journal import Journal, Record
from tests.chaos.load import note_event

WINDOW = Window(from_s=0.0, fault_s=4.0, undone_s=8.0, to_s=14.0)


def right(number: int, sent_s: float, took_s: float = 0.01) -> Record:
    return Record(str(number), "identity", sent_s, sent_s + 5.0, sent_s + took_s, Status.OK, num_answers=1)


def journal_with(*changed: Callable[[Record], object], at_s: float = 5.0) -> Journal:
    """A request every 50 ms, all of them right, those from `at_s` on changed one by one."""
    journal = Journal([right(number, number / 20) for number in range(14 * 20)])
    for record, change in zip(journal.between(at_s, 14.0), changed, strict=False):
        change(record)
    return journal


def fail(status: Status, is_retryable: bool = False) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        record.status, record.is_retryable, record.num_answers = status, is_retryable, 0

    return change


def after(took_s: float) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        record.ended_s = record.sent_s + took_s

    return change


def put(**values: object) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        for name, value in values.items():
            setattr(record, name, value)

    return change


def test_nothing_wrong_misses_nothing() -> None:
    verdict = judge(journal_with(), WINDOW)
    assert (verdict.sent, verdict.ok, verdict.recovery_s) == (280, 280, 0.0)
    assert verdict.misses(Aims()) == []
    assert verdict.examples == []


@pytest.mark.parametrize(("change", "figure"), [
    (fail(Status.UNAVAILABLE, is_retryable=True), "lost"),
    (fail(Status.DEADLINE_EXCEEDED), "lost"),
    (fail(Status.RESOURCE_EXHAUSTED, is_retryable=True), "lost"),
    (fail(Status.INTERNAL), "refused"),
    (fail(Status.NOT_FOUND), "refused"),
    (put(wrong="another answer"), "wrong"),
    (put(twice="token 3 came again"), "twice"),
    (put(num_answers=2), "twice"),
    (after(5.2), "late"),
    (put(ended_s=None, status=None), "open"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_one_bad_request_misses_its_aim(change: Callable[[Record], None], figure: str) -> None:
    verdict = judge(journal_with(change), WINDOW)
    found = {name: getattr(verdict, name) for name in ("lost", "refused", "wrong", "twice", "late", "open")}
    assert found == {name: int(name == figure) for name in found}
    assert verdict.misses(Aims())
    assert len(verdict.examples) == 1


def test_what_this_process_was_late_to_see_is_not_late() -> None:
    journal = journal_with(after(5.2))
    (record,) = [record for record in journal.records if record.took_s > 5]
    journal.pauses.append((record.deadline_s + 0.01, record.deadline_s + 0.22))
    assert judge(journal, WINDOW).late == 0
    journal.pauses[:] = [(record.deadline_s - 2.0, record.deadline_s - 1.0)]
    assert judge(journal, WINDOW).late == 1


def test_success_is_a_share() -> None:
    few = judge(journal_with(*[fail(Status.UNAVAILABLE, is_retryable=True)] * 2), WINDOW)
    assert few.success == pytest.approx(278 / 280)
    assert few.misses(Aims(lost=2, least_success=0.99)) == []
    assert "success" in "".join(few.misses(Aims(lost=2)))
    assert Verdict().misses(Aims()), "nothing sent, nothing shown"


def test_recovery_begins_with_the_first_two_steady_seconds() -> None:
    assert judge(journal_with(*[fail(Status.UNAVAILABLE)] * 20), WINDOW).recovery_s == pytest.approx(2.0, abs=0.06)
    slow = judge(journal_with(*[after(1.0)] * 40), WINDOW)
    assert slow.lost == 0
    assert slow.recovery_s == pytest.approx(3.0, abs=0.15)
    never = judge(journal_with(*[fail(Status.UNAVAILABLE)] * 280), WINDOW)
    assert never.recovery_s is None
    assert "no steady success after the fault" in never.misses(Aims(lost=280, least_success=0.0))


def test_only_the_window_counts() -> None:
    journal = journal_with(fail(Status.INTERNAL), at_s=2.0)
    assert judge(journal, Window(3.0, 4.0, 8.0, 14.0)).refused == 0
    assert judge(journal, WINDOW).refused == 1


def test_latencies_are_those_of_their_time() -> None:
    verdict = judge(journal_with(*[after(0.5)] * 60, at_s=4.0), WINDOW)
    assert verdict.p99_before_s == pytest.approx(0.01)
    assert verdict.p99_during_s == pytest.approx(0.5)
    assert verdict.p99_after_s == pytest.approx(0.01)
    assert verdict.slowest_s == pytest.approx(0.5)


@pytest.mark.parametrize(("offsets", "twice", "wrong"), [((0, 1, 2), False, False), ((0, 1, 1), True, False), ((0, 2), False, True)])
def test_each_token_comes_once_and_in_order(offsets: tuple[int, ...], twice: bool, wrong: bool) -> None:
    record, tokens = Record("1", "stream", 0.0, 1.0), list[int]()
    for offset in offsets:
        note_event(record, tokens, Delta(0, offset, (offset,), "x"))
    assert (bool(record.twice), bool(record.wrong)) == (twice, wrong)


def test_a_stream_that_ends_twice_is_answered_twice() -> None:
    record = Record("1", "stream", 0.0, 1.0)
    for _ in range(2):
        note_event(record, [], Finished(0, "length", "", 3, 0, 0, 1, "group"))
    assert record.num_answers == 2

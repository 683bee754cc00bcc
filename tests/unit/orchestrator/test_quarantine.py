"""What is in quarantine, and which documents of it are to go: integers for clocks."""

from __future__ import annotations

import logging

import pytest

from tensorway_orchestrator.quarantine import KEPT_S, MAX_KEPT, Content, Quarantine, Quarantines
from tensorway_orchestrator.quarantine_view import Note, QuarantineView, encode_note, quarantine_key

REVISION = "ab" * 32
CONTENT = Content("echo", REVISION, "c0ffee")
#: The wall clock, where the monotonic one says 0.
UNIX_S = 1_700_000_000.0


def document(until_s: float, orchestrator: str = "other") -> bytes:
    return encode_note(Note(UNIX_S + until_s, orchestrator, ("a#1", "b#1")))


def view_of(documents: dict[str, bytes], *, now_s: float = 0.0, skew_s: float = 0.0) -> QuarantineView:
    view = QuarantineView("me", patience_s=60.0)
    view.take(documents, UNIX_S + now_s + skew_s, now_s)
    return view


# One revision


def test_a_find_is_refused_for_its_time_and_told() -> None:
    told: list[tuple[str, tuple[str, ...]]] = []
    quarantine = Quarantine(lambda fingerprint, groups: told.append((fingerprint, groups)))
    assert not quarantine
    quarantine.add("x", ("a", "b"), 10.0)
    assert told == [("x", ("a", "b"))]
    assert quarantine and quarantine.holds("x", 9.0 + KEPT_S) and not quarantine.holds("y", 10.0)
    assert not quarantine.holds("x", 10.0 + KEPT_S)
    assert not quarantine


def test_what_is_shown_is_refused_until_it_ends_or_is_lifted_and_is_not_told_again() -> None:
    told: list[str] = []
    quarantine = Quarantine(lambda fingerprint, _: told.append(fingerprint))
    quarantine.show({"late": 300.0, "soon": 100.0, "over": 50.0}, 60.0)
    assert [quarantine.holds(each, 60.0) for each in ("late", "soon", "over")] == [True, True, False]
    assert [quarantine.holds(each, 100.0) for each in ("late", "soon")] == [True, False]
    quarantine.show({"soon": 100.0, "over": 50.0}, 110.0)
    assert not quarantine and told == []


def test_a_find_stays_while_the_registry_does_not_hold_it_yet_and_goes_when_it_is_deleted_there() -> None:
    quarantine = Quarantine()
    quarantine.add("x", (), 0.0)
    quarantine.show({}, 1.0)
    assert quarantine.holds("x", 2.0)
    quarantine.show({"x": KEPT_S}, 3.0)
    quarantine.show({}, 4.0)
    assert not quarantine


@pytest.mark.parametrize("is_shown_again", [False, True])
def test_a_find_is_not_lifted_with_an_older_document_of_it(is_shown_again: bool) -> None:
    quarantine = Quarantine()
    quarantine.show({"x": 100.0}, 0.0)
    quarantine.add("x", (), 200.0)
    if is_shown_again:
        quarantine.show({"x": 100.0}, 201.0)  # not written anew yet
    quarantine.show({}, 202.0)
    assert quarantine.holds("x", 203.0)


def test_no_more_are_kept_than_the_bound_and_the_soonest_to_end_goes() -> None:
    quarantine = Quarantine()
    quarantine.show({f"f{number}": 100.0 + number for number in range(MAX_KEPT + 10)}, 0.0)
    quarantine.add("own", (), 0.0)
    assert not quarantine.holds("f10", 0.0) and quarantine.holds("f11", 0.0)
    assert quarantine.holds("own", 0.0) and quarantine.holds(f"f{MAX_KEPT + 9}", 0.0)


# All revisions


def test_what_is_shown_waits_for_its_lane_and_comes_to_no_other() -> None:
    quarantines = Quarantines()
    quarantines.show({CONTENT: 100.0}, 0.0)
    assert quarantines.of("echo", REVISION).holds("c0ffee", 1.0)
    assert not quarantines.of("echo", "cd" * 32)
    quarantines.show({}, 2.0)
    assert not quarantines.of("echo", REVISION)


def test_a_find_is_told_with_its_model_and_revision() -> None:
    told: list[tuple[Content, tuple[str, ...]]] = []
    quarantines = Quarantines()
    lane = quarantines.of("echo", REVISION)
    quarantines.on_found = lambda content, groups: told.append((content, groups))
    lane.add("c0ffee", ("a", "b"), 0.0)
    assert told == [(CONTENT, ("a", "b"))]


# Documents


def test_a_document_counts_from_when_it_is_first_seen() -> None:
    key, until = quarantine_key(CONTENT), document(100.0)
    view = view_of({key: until})
    assert view.contents() == {CONTENT: 100.0}
    assert view.take({key: until}, UNIX_S + 5000.0, 10.0) == [], "the wall clock was set"
    assert view.contents() == {CONTENT: 100.0}
    assert [row.until_s for row in view.take({key: document(300.0)}, UNIX_S + 10.0, 10.0)] == [300.0]


def test_clocks_that_differ_shorten_or_lengthen_by_as_much_and_never_beyond_the_time_of_a_find() -> None:
    documents = {quarantine_key(CONTENT): document(100.0)}
    assert view_of(documents, skew_s=-7.0).contents() == {CONTENT: 107.0}
    assert view_of(documents, skew_s=7.0).contents() == {CONTENT: 93.0}
    assert view_of(documents, skew_s=-86400.0).contents() == {CONTENT: KEPT_S}


def test_a_models_name_may_have_dots() -> None:
    content = Content("llama-3.2.1b", REVISION, "c0ffee")
    assert view_of({quarantine_key(content): document(100.0)}).contents() == {content: 100.0}


def test_the_longest_key_is_a_file_name_in_a_directory() -> None:
    key = quarantine_key(Content("m" * 128, REVISION, "f" * 32))
    assert len(key.replace("/", "%2F")) <= 255


def test_what_cannot_be_read_is_ignored_with_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    good, now = quarantine_key(CONTENT), UNIX_S
    broken = {
        "quarantine/echo": document(100.0), "quarantine/a.b.c": b"{not json", "quarantine/a.b.d": b"\xff", "quarantine/a.b.e": b"{}",
        "quarantine/a.b.f": b'{"until_unix_s": NaN, "orchestrator": "x"}',
    }
    view = QuarantineView("me", patience_s=60.0)
    with caplog.at_level(logging.ERROR):
        view.take(broken, now, 0.0)
        view.take({**broken, good: document(100.0)}, now + 1.0, 1.0)
    assert view.contents() == {CONTENT: 100.0}
    assert sorted(record.getMessage().split()[1] for record in caplog.records) == sorted(broken)
    assert view.overdue(1e9) == [(good, document(100.0))], "they are left to whoever can read them"


def test_own_documents_go_when_they_are_over_and_those_of_others_long_after() -> None:
    own, others = quarantine_key(CONTENT), quarantine_key(Content("echo", REVISION, "f00d"))
    view = view_of({own: document(100.0, "me"), others: document(100.0)})
    assert view.overdue(99.0) == []
    assert [key for key, _ in view.overdue(100.0)] == [own]
    assert [key for key, _ in view.overdue(KEPT_S + 59.0)] == [own]
    assert sorted(key for key, _ in view.overdue(KEPT_S + 60.0)) == sorted((own, others))


def test_whoses_clock_is_behind_loses_no_document_that_it_still_heeds() -> None:
    """An hour behind: its documents are over when they come."""
    view = view_of({quarantine_key(CONTENT): document(KEPT_S - 3600.0)})
    assert view.overdue(KEPT_S) == []


def test_one_more_document_makes_room_by_the_soonest_to_end() -> None:
    full = {quarantine_key(Content("echo", REVISION, f"f{number}")): document(100.0 + number) for number in range(MAX_KEPT + 1)}
    others = {quarantine_key(Content("echo", "cd" * 32, "f")): document(1.0)}
    assert [key[-2:] for key, _ in view_of({**full, **others}).surplus("echo", REVISION)] == ["f0", "f1"]
    assert view_of(others).surplus("echo", "cd" * 32) == []

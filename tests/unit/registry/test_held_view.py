"""What a watch shows of a registry that may lie for a moment: integers for time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tensorway.registry.held_view import HeldView


def test_nothing_is_shown_before_the_first_look() -> None:
    view: HeldView[int] = HeldView(5)
    view.disturb()
    assert view.shown is None
    assert view.settles_in_s(0) is None
    assert view.take({}, 1)
    assert view.shown == {}


def test_undisturbed_everything_shows_at_once() -> None:
    view: HeldView[int] = HeldView(5)
    assert view.take({"a": 1, "b": 1}, 0)
    assert view.take({"b": 2}, 1)
    assert view.shown == {"b": 2}
    assert not view.take({"b": 2}, 2)


def test_after_a_disturbance_removals_wait_and_nothing_else_does() -> None:
    view: HeldView[int] = HeldView(5)
    view.take({"gone": 1, "changed": 1}, 0)
    view.disturb()
    assert view.take({"changed": 2, "new": 1}, 100)
    assert view.shown == {"gone": 1, "changed": 2, "new": 1}
    assert view.settles_in_s(101) == 4
    assert not view.settle(104)
    assert view.settle(105)
    assert view.shown == {"changed": 2, "new": 1}
    assert view.settles_in_s(105) is None


def test_what_comes_back_in_time_never_went() -> None:
    view: HeldView[int] = HeldView(5)
    view.take({"a": 1, "b": 1}, 0)
    view.disturb()
    assert not view.take({}, 10)
    assert not view.take({"b": 1}, 11)
    assert not view.take({"a": 1, "b": 1}, 12)
    assert view.settles_in_s(12) is None
    assert view.take({"a": 1}, 16)
    assert view.shown == {"a": 1}


def test_another_disturbance_begins_anew() -> None:
    view: HeldView[int] = HeldView(5)
    view.take({"a": 1}, 0)
    view.disturb()
    view.take({}, 10)
    view.disturb()
    assert not view.settle(14)
    assert not view.take({}, 14)
    assert not view.settle(18)
    assert view.settle(19)
    assert view.shown == {}


def test_no_settle_time_holds_nothing() -> None:
    view: HeldView[int] = HeldView(0)
    view.take({"a": 1}, 0)
    view.disturb()
    assert view.take({}, 1)


_ROWS = st.dictionaries(st.sampled_from("abc"), st.integers(0, 2))


@given(st.lists(st.tuples(st.integers(0, 4), st.one_of(st.none(), _ROWS)), max_size=30))
def test_the_latest_is_always_shown_and_in_the_end_nothing_but_it(steps: list[tuple[int, dict[str, int] | None]]) -> None:
    """`None` is a disturbance. Shown is the truth, and besides it only what was shown before."""
    view: HeldView[int] = HeldView(5)
    now, truth = 0, None
    for passed, rows in steps:
        now += passed
        before = view.shown
        if rows is None:
            view.disturb()
            continue
        truth = rows
        has_changed = view.take(rows, now)
        assert has_changed == (view.shown != before)
        assert view.shown is not None
        assert view.shown.items() >= rows.items()
        assert view.shown.items() <= {**(before or {}), **rows}.items()
    view.settle(now + 5)
    assert view.shown == truth

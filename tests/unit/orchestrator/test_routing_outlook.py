"""What admission may promise."""

from __future__ import annotations

import pytest
from roster_bench import Bench

from tensorway_orchestrator.outlook import Outlook


def outlook() -> tuple[Outlook, Bench]:
    bench = Bench(1)
    bench.run("g0", 0.1, 20, rows=8)
    return Outlook(bench.roster), bench


def finish_after_s(outlook: Outlook, bench: Bench, rows_ahead: int, priority: int = 0) -> float:
    promise = outlook.promise(rows_ahead, 1, priority, bench.now_s)
    assert promise is not None
    return promise.finish_s - bench.now_s


def test_nothing_is_promised_from_too_little() -> None:
    assert Outlook(Bench(1).roster).promise(10, 1, 0, 100.0) is None


def test_what_comes_with_higher_priority_is_waited_for() -> None:
    seen, bench = outlook()
    before_s = finish_after_s(seen, bench, 80)
    for _ in range(40 * 10):  # half of the 80 rows a second that the group serves, for 10 s
        bench.now_s += 0.025
        seen.admitted(1, 1, bench.now_s)
    assert seen.overtaking_per_s(0, bench.now_s) == pytest.approx(40.0, rel=0.05)
    assert seen.overtaking_per_s(1, bench.now_s) == 0.0
    assert finish_after_s(seen, bench, 80) == pytest.approx(before_s + 1.0, abs=0.2)
    assert finish_after_s(seen, bench, 80, priority=1) == pytest.approx(before_s, abs=0.01)
    bench.now_s += 20.0
    assert seen.overtaking_per_s(0, bench.now_s) < 0.1


def test_a_rate_is_known_soon_after_the_first_requests() -> None:
    seen, bench = outlook()
    for _ in range(20):
        bench.now_s += 0.025
        seen.admitted(3, 1, bench.now_s)
    assert seen.overtaking_per_s(2, bench.now_s) == pytest.approx(40.0, rel=0.15)


def test_the_margin_grows_with_what_comes_late_and_shrinks_again() -> None:
    seen, bench = outlook()
    before_s = finish_after_s(seen, bench, 80)
    late, joined = seen.promise(80, 1, 0, bench.now_s), seen.promise(2, 1, 0, bench.now_s)
    assert late is not None
    assert joined is not None
    for _ in range(100):
        seen.answered(late, late.finish_s + 0.5)
        seen.missed(joined)
    assert finish_after_s(seen, bench, 80) == pytest.approx(before_s + 0.09, abs=0.01)
    assert finish_after_s(seen, bench, 2) == pytest.approx(joined.finish_s - bench.now_s), "what joins the next batch gets no margin"
    assert finish_after_s(seen, bench, 80, priority=5) == pytest.approx(before_s), "each priority learns for itself"
    for _ in range(100_000):
        seen.missed(late)
    assert finish_after_s(seen, bench, 80) == pytest.approx(before_s + 0.4, abs=0.01)
    for _ in range(5000):
        seen.answered(late, late.finish_s)
    assert finish_after_s(seen, bench, 80) == pytest.approx(before_s)

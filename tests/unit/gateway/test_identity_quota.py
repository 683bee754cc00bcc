"""Quotas with a given clock; and the audit log when the disk is full."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.access.schema import QuotaRule
from tensorway_gateway.identity.audit import AuditEntry, AuditLog
from tensorway_gateway.identity.quota import Meter, Meters, QuotaExceeded, TokenBucket


def meter(**limits: float) -> Meter:
    made = Meter("key:a", QuotaRule(**limits))  # type: ignore[arg-type]
    made.set_rule(made.rule, 0.0)
    return made


def wait_of(made: Meter, now_s: float) -> float:
    with pytest.raises(QuotaExceeded) as raised:
        made.enter(now_s)
    return raised.value.retry_after_s


def test_a_rate_and_its_burst() -> None:
    made = meter(requests_per_s=2, burst=3)
    for _ in range(3):
        made.enter(10.0)
    assert wait_of(made, 10.0) == pytest.approx(0.5)
    assert wait_of(made, 10.25) == pytest.approx(0.25)
    made.enter(10.5)
    assert wait_of(made, 10.5) == pytest.approx(0.5)
    # A long pause fills no more than the burst.
    for _ in range(3):
        made.enter(1000.0)
    assert wait_of(made, 1000.0) == pytest.approx(0.5)


@given(st.lists(st.floats(0, 5), min_size=1, max_size=60), st.floats(0.1, 50), st.floats(1, 20))
def test_no_more_than_the_rate_and_the_wait_is_true(pauses: list[float], rate: float, burst: float) -> None:
    bucket, now_s = TokenBucket(rate, burst, 0.0), 0.0
    for num_taken, pause_s in enumerate(pauses, 1):
        now_s += pause_s
        wait_s = bucket.take(1.0, now_s)
        if wait_s:
            assert bucket.take(1.0, now_s + wait_s * 0.99 - 1e-9) > 0
            now_s += wait_s + 1e-6
            assert bucket.take(1.0, now_s) == 0.0
        assert num_taken <= burst + rate * now_s + 1e-3


def test_what_is_in_flight_has_a_limit_of_its_own() -> None:
    made = meter(max_in_flight=2)
    made.enter(0.0)
    made.enter(0.0)
    assert wait_of(made, 0.0) > 0
    made.leave(0.4)
    made.enter(0.0)
    # Streams that only carry requests have as many places, and no others.
    made.open_stream()
    made.open_stream()
    with pytest.raises(QuotaExceeded):
        made.open_stream()
    made.close_stream()
    made.open_stream()


def test_a_refused_request_takes_nothing() -> None:
    made = meter(requests_per_s=1, burst=2, max_in_flight=1)
    made.enter(0.0)
    for _ in range(5):
        wait_of(made, 0.0)
    made.leave(0.1)
    made.enter(0.0)
    made.leave(0.1)
    assert wait_of(made, 0.0) == pytest.approx(1.0)


def test_tokens_are_paid_afterwards() -> None:
    made = meter(tokens_per_s=10)
    made.enter(0.0)
    made.spend_tokens(60, 0.0)
    made.leave(1.0)
    assert wait_of(made, 0.0) == pytest.approx(5.0)
    assert wait_of(made, 4.0) == pytest.approx(1.0)
    made.enter(5.0)


def test_meters_outlive_a_change_of_the_file_and_idle_ones_are_forgotten() -> None:
    meters = Meters(max_idle=3)
    slow, fast = QuotaRule(requests_per_s=1, burst=5), QuotaRule(requests_per_s=100, burst=100)
    one = meters.of("a", slow, 0.0)
    for _ in range(5):
        one.enter(0.0)
    assert meters.of("a", fast, 0.0) is one
    assert wait_of(one, 0.0) == pytest.approx(0.01)
    assert meters.of("a", QuotaRule(), 0.0) is one
    one.enter(0.0)
    assert meters.of("a", slow, 0.0) is one
    for index in range(50):
        meters.of(f"jwt:{index}", slow, 1.0)
    assert meters.of("a", slow, 1.0) is one, "one in use is never forgotten"
    assert len(meters._meters) <= 4


def entry(detail: str = "") -> AuditEntry:
    return AuditEntry("key:a", "manage", "/m", "model", "peer", "r", "allowed", "OK", detail)


async def test_a_full_disk_stops_nothing_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog("/dev/full")
    writing = asyncio.ensure_future(log.run())
    for wanted in (1, 2, 3):
        log.note(entry())
        while log.num_lost < wanted:
            await asyncio.sleep(0.001)
    assert caplog.text.count("cannot be written") == 1
    log._path = str(tmp_path / "audit")
    log.note(entry())
    while "can be written again; 3 lines were lost" not in caplog.text:
        await asyncio.sleep(0.001)
    # The file is moved away under it.
    os.rename(tmp_path / "audit", tmp_path / "audit.1")
    log.note(entry('quote " and\nline'))
    while not (tmp_path / "audit").exists() or not (tmp_path / "audit").read_text():
        await asyncio.sleep(0.001)
    assert json.loads((tmp_path / "audit").read_text())["detail"] == 'quote " and\nline'
    writing.cancel()
    await asyncio.wait({writing})
    log.note(entry())
    log.flush()
    assert len((tmp_path / "audit").read_text().splitlines()) == 2


async def test_many_refusals_are_summed_up(tmp_path: Path) -> None:
    log = AuditLog(str(tmp_path / "audit"))
    for _ in range(20_000):
        log.note_refusal(entry())
    log.flush()
    lines = (tmp_path / "audit").read_text().splitlines()
    assert 500 <= len(lines) < 5000
    for _ in range(20_000):
        log.note(entry())
    assert log.num_lost == 10_000

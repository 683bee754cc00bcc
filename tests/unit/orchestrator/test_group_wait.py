"""How long requests wait for a group: a loop, and waits of hundredths of a second."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from tensorway_orchestrator import group_wait
from tensorway_orchestrator.group_wait import GroupWait


def waiting(wait_s: float = 0.02) -> tuple[GroupWait, asyncio.Event]:
    given_up = asyncio.Event()
    return GroupWait(wait_s, given_up.set), given_up


async def test_it_gives_up_where_a_group_is_wanted_and_does_not_come() -> None:
    wait, given_up = waiting()
    wait.missing(is_registered=False)
    await asyncio.wait_for(given_up.wait(), 5)
    assert wait.is_over(time.monotonic() + 1)


async def test_it_waits_on_while_a_group_starts_that_nobody_had_wanted() -> None:
    wait, given_up = waiting()
    wait.missing(is_registered=False)
    wait.dormant(True)
    wait.dormant(False)
    wait.missing(is_registered=True)
    await asyncio.sleep(0.1)  # longer than any limit: nothing happens, which has no event
    assert not given_up.is_set() and not wait.is_over(time.monotonic() + 1e9)
    wait.found()
    wait.missing(is_registered=False)
    await asyncio.wait_for(given_up.wait(), 5)


async def test_a_group_that_drains_after_its_model_fell_asleep_changes_nothing() -> None:
    wait, given_up = waiting()
    wait.found()
    wait.dormant(True)
    wait.found()
    wait.missing(is_registered=True)
    assert wait.is_patient and not wait.is_over(time.monotonic() + 1e9)
    wait.stop()
    assert not given_up.is_set()


async def test_a_number_that_falls_to_zero_and_rises_while_a_group_lives_leaves_no_trace() -> None:
    wait, given_up = waiting()
    wait.found()
    wait.dormant(True)
    wait.dormant(False)
    wait.missing(is_registered=False)
    await asyncio.wait_for(given_up.wait(), 5)


async def test_where_another_model_answers_nobody_waits() -> None:
    wait, given_up = waiting(0.0)
    wait.dormant(True)
    wait.missing(is_registered=False)
    await asyncio.wait_for(given_up.wait(), 5)
    assert wait.is_over(time.monotonic() + 1)


async def test_a_group_that_has_just_come_back_gets_the_time_to_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader is registered before a link to it is up: how long there was none says nothing about that one."""
    now_s = time.monotonic()
    monkeypatch.setattr(group_wait, "time", SimpleNamespace(monotonic=lambda: now_s))
    wait, given_up = waiting(30.0)
    wait.missing(is_registered=True)
    assert wait.is_over(now_s + 2.5), "it lives, but not for us"
    wait.missing(is_registered=False)
    assert not wait.is_over(now_s + 29.0)
    now_s += 20.0
    wait.missing(is_registered=True)
    wait.missing(is_registered=True)
    assert not wait.is_over(now_s + 1.5)
    assert wait.is_over(now_s + 2.5)
    now_s += 9.5
    wait.missing(is_registered=False)
    wait.missing(is_registered=True)
    assert wait.is_over(now_s + 1.0), "no longer than any group is waited for"
    wait.found()
    assert not wait.is_over(now_s + 1e9)
    assert not given_up.is_set()

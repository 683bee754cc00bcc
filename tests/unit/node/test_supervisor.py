"""A group of two real ranks: every rank is watched, and whoever is guilty is named."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from pathlib import Path

import pytest
from supervised import chain, gone, supervised

from tests.contract.registry.views import together

TWO = "{pipeline: 2}"


async def test_two_ranks_form_a_group_and_all_of_it_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with supervised(chain(tmp_path, TWO), tmp_path) as group:
        report = await group.ready()
        assert [(rank.rank, rank.node, rank.state, rank.device) for rank in report.ranks] == [
            (0, "node-1", "ready", "cpu"), (1, "node-1", "ready", "cpu"),
        ]
        assert report.endpoint.startswith("127.0.0.1:")
        assert all(rank.memory_bytes > 10_000_000 for rank in report.ranks)
        document = report.to_document()
        assert [rank["pid"] for rank in document["ranks"]] == [rank.pid for rank in report.ranks]
        pids = [rank.pid for rank in report.ranks]
    await gone(*pids)
    fields = [record.fields for record in caplog.records if hasattr(record, "fields")]
    progress = [(one["rank"], one["state"]) for one in fields if "rank" in one]
    assert {(0, "loading"), (1, "loading"), (0, "warming"), (0, "ready"), (1, "ready")} <= set(progress)
    assert group.seen[-1][0] == "stopping"
    assert any("rank 1 on node-1" in detail or "rank 0 on node-1" in detail for _, detail in group.seen)


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_killed_rank_is_named_and_the_group_forms_anew(tmp_path: Path, victim: int) -> None:
    async with supervised(chain(tmp_path, TWO), tmp_path) as group:
        before = tuple(rank.pid for rank in (await group.ready()).ranks)
        reasons: list[str] = []
        group.supervisor.on_change = lambda: (reasons.append(group.report.reason), group.on_change())[0]
        os.kill(before[victim], signal.SIGKILL)
        report = await group.ready(2)
        assert next(reason for reason in reasons if reason).startswith(f"epoch 1: rank {victim} on node-1 was killed by SIGKILL")
        await gone(*before)
        assert not set(before) & {rank.pid for rank in report.ranks}


async def test_a_stopped_follower_is_found_by_its_silence(tmp_path: Path) -> None:
    async with supervised(chain(tmp_path, TWO), tmp_path, hung_after_s=1.0) as group:
        before = tuple(rank.pid for rank in (await group.ready()).ranks)
        reasons: list[str] = []
        group.supervisor.on_change = lambda: (reasons.append(group.report.reason), group.on_change())[0]
        os.kill(before[1], signal.SIGSTOP)
        await group.ready(2)
        assert next(reason for reason in reasons if reason).startswith("epoch 1: rank 1 on node-1 has been silent for 1.0 s")
        await gone(*before)


async def test_a_node_that_did_not_run_itself_does_not_blame_its_ranks(tmp_path: Path) -> None:
    async with supervised(chain(tmp_path, TWO), tmp_path, hung_after_s=1.0) as group:
        before = tuple(rank.pid for rank in (await group.ready()).ranks)
        time.sleep(2.5)  # noqa: ASYNC251 - what the ranks say meanwhile lies unread in their pipes
        await asyncio.sleep(2.5)  # long enough for a wrong verdict, and for a hung rank to be found
        assert (group.report.epoch, group.report.state) == (1, "ready")
        assert tuple(rank.pid for rank in group.report.ranks) == before


async def test_a_rank_that_cannot_start_is_named_with_its_own_last_lines(tmp_path: Path) -> None:
    """One group after the other, while one whose rank never gets ready uses up its time."""
    loads = asyncio.Event()

    async def one_after_the_other() -> None:
        await loads.wait()
        await _is_named(tmp_path / "raises", "raise ValueError('no such file')", "load raised ValueError: no such file")
        await _is_named(tmp_path / "exits", "os._exit(3)", "exited with status 3")
        await _is_named(tmp_path / "dies", "os.kill(os.getpid(), 9)", "was killed by SIGKILL")

    await together(one_after_the_other(), _a_rank_that_never_gets_ready_is_named(tmp_path / "sleeps", loads))


async def _is_named(folder: Path, code: str, words: str) -> None:
    async with supervised(chain(folder, TWO, code), folder) as group:
        reason = await group.failed()
        assert reason.startswith("epoch 1: rank 1 on node-1")
        assert words in reason
        assert "about to misbehave" in reason
        assert group.report.ranks == ()


async def _a_rank_that_never_gets_ready_is_named(folder: Path, loads: asyncio.Event) -> None:
    """`loads` is set once all its ranks have come as far as they will."""
    model = chain(folder, TWO, "time.sleep(600)", startup_timeout_s=16.0)
    async with supervised(model, folder) as group:
        await group.until(lambda report: report.state == "loading")
        loads.set()
        reason = await group.failed()
        assert "on node-1 is not ready within startup_timeout_s=16 (state " in reason
        # Rank 0 may be held up by it, and then is named, too.
        assert "about to misbehave" in reason[reason.index("rank 1 on node-1") :]


async def test_a_group_over_two_nodes_without_a_partner_backs_off_and_says_so(tmp_path: Path) -> None:
    async with supervised(chain(tmp_path, "{pipeline: 2, nodes: 2}"), tmp_path, rank_interface="lo") as group:
        reason = await group.failed()
        assert "no free partner: the group wants 1 more node, and 0 other live nodes offer revision" in reason

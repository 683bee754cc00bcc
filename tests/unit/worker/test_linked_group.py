"""Ranks in processes of their own, linked by real PyTorch RPC and gloo, without a node."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_HERE = Path(__file__).parent


@contextmanager
def ranks(folder: Path, pipeline: int, tensor: int, program: str) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of one group, by rank; all gone at the end."""
    started: list[subprocess.Popen[str]] = []
    for rank in range(pipeline * tensor):
        command = [sys.executable, str(_HERE / "linked_rank.py"), str(rank), str(pipeline), str(tensor), str(folder), program]
        with (folder / f"rank-{rank}.log").open("w") as log:
            started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True))
    try:
        yield started
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.communicate()


def outcome(folder: Path, leader: subprocess.Popen[str]) -> dict[str, object]:
    assert leader.stdout is not None
    lines = leader.stdout.read().splitlines()
    assert lines, (folder / "rank-0.log").read_text()
    return dict(json.loads(lines[-1]))


def run(folder: Path, pipeline: int, tensor: int, program: str) -> dict[str, object]:
    with ranks(folder, pipeline, tensor, program) as (leader, *_):
        return outcome(folder, leader)


@pytest.mark.parametrize(("pipeline", "tensor", "tolerance"), [(2, 1, 0.0), (4, 1, 0.0), (1, 2, 1e-5), (2, 2, 1e-5)])
def test_steps_equal_the_whole_model(tmp_path: Path, pipeline: int, tensor: int, tolerance: float) -> None:
    found = run(tmp_path, pipeline, tensor, "steps")
    assert found["steps"] == 8
    assert found["difference"] <= tolerance


@pytest.mark.parametrize(("pipeline", "tensor"), [(4, 1), (2, 2)])
def test_a_failing_stage_fails_its_step_and_no_other(tmp_path: Path, pipeline: int, tensor: int) -> None:
    found = run(tmp_path, pipeline, tensor, "failures")
    assert re.search(r"ModelFailed: forward raised ValueError: too large \(rank \d\)", str(found["said"]))
    assert found["then"] == [3, 6]


@pytest.mark.parametrize(("pipeline", "tensor", "tolerance"), [(2, 1, 0.0), (4, 1, 0.0), (2, 2, 1e-4)])
def test_gradients_across_ranks_equal_local_ones_and_never_mix(tmp_path: Path, pipeline: int, tensor: int, tolerance: float) -> None:
    found = run(tmp_path, pipeline, tensor, "gradients")
    differences = found["found"]
    assert isinstance(differences, dict)
    assert len(differences) == found["jobs"] == (6 if tensor > 1 else 12), (tmp_path / "rank-0.log").read_text()
    assert max(differences.values()) <= tolerance
    assert "no output 'z'" in str(found["said"])
    assert found["after"] <= tolerance


def test_nobody_can_connect_once_the_ranks_have_met(tmp_path: Path) -> None:
    assert run(tmp_path, 2, 2, "listening") == {"sockets": 0, "y": [2, 6]}


def test_a_killed_rank_fails_what_runs_at_once(tmp_path: Path) -> None:
    with ranks(tmp_path, 2, 1, "wait") as (leader, follower):
        assert leader.stdout is not None
        assert leader.stdout.readline() == "waiting\n", (tmp_path / "rank-0.log").read_text()
        time.sleep(0.3)
        follower.kill()
        assert "GroupLost" in str(outcome(tmp_path, leader)["said"])


def test_a_stranger_can_run_no_code_and_a_group_that_he_joined_does_not_serve(tmp_path: Path) -> None:
    with ranks(tmp_path, 2, 1, "late") as (leader, _):
        deadline = time.monotonic() + 30
        while not (tmp_path / "open-0").exists() or not (tmp_path / "open-1").exists():
            assert time.monotonic() < deadline, (tmp_path / "rank-0.log").read_text()
            time.sleep(0.02)
        mark = tmp_path / "made-by-a-stranger"
        # RPC's listening socket is the one that opened last.
        ports = listening_ports(leader.pid)
        command = [sys.executable, str(_HERE / "stranger.py"), str(ports[-1]), str(mark)]
        stranger = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert stranger.stdout is not None
            assert stranger.stdout.readline().split()[0] == "refused"
            assert stranger.stdout.readline().split() == ["builtin", "2.0"]
            assert not mark.exists()
            (tmp_path / "go").touch()
            assert leader.wait(30) != 0
            assert "connections that are no rank's" in (tmp_path / "rank-0.log").read_text()
        finally:
            stranger.kill()
            stranger.communicate()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", ports[-1]), 1)


def listening_ports(pid: int) -> list[int]:
    """TCP ports on which a process listens, in the order of its descriptors."""
    rows = (line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:])
    ports = {row[9]: int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A"}
    found: list[int] = []
    for entry in sorted(os.listdir(f"/proc/{pid}/fd"), key=int):
        inode = os.readlink(f"/proc/{pid}/fd/{entry}").removeprefix("socket:[").removesuffix("]")
        if inode in ports:
            found.append(ports[inode])
    return found

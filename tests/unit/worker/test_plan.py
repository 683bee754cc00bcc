"""`tensorway plan` and the program behind it, on real model directories."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cut_ranks import NET, author_directory
from typer.testing import CliRunner
from worker_wire import MODELS

from tensorway.cli import app as cli


def planned(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "tensorway_worker.plan", str(path), *options]
    return subprocess.run(program, capture_output=True, text=True, timeout=100, check=False)


def test_every_rank_is_told_what_it_would_hold(tmp_path: Path) -> None:
    ran = planned(author_directory(tmp_path), "--pipeline", "2", "--rows", "4", "--threads", "1", "--hop-us", "500")
    assert ran.returncode == 0, ran.stderr
    plan = json.loads(ran.stdout)
    assert (plan["pipeline"], plan["tensor"], plan["rows"], plan["hop_s"], plan["num_units"]) == (2, 1, 4, 0.0005, 10)
    first, last = plan["ranks"]
    # embed 50 x 16 (tied to the head), four layers 16 x 16 + 16, norm 4 x 16 and a counter of 8 bytes.
    assert plan["whole_weights_bytes"] == 4 * (50 * 16 + 4 * (16 * 16 + 16) + 4 * 16) + 8
    assert first["weights_bytes"] + last["weights_bytes"] == plan["whole_weights_bytes"] + 4 * 50 * 16
    assert first["holds"].startswith("net.embed …")
    assert last["holds"].endswith("net.head")
    assert max(first["busy_share"], last["busy_share"]) == 1.0
    assert plan["step_s"]["1"] == pytest.approx(first["time_s"] + last["time_s"] + 2 * 0.0005)
    # The widest activation: 4 rows x 50 numbers, and what it is made from.
    assert 4 * 4 * 50 <= last["activation_bytes"] <= 4 * 4 * (50 + 50 + 16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--pipeline", "11"), "net cannot be cut into 11 pipeline stages: it is one chain of 10 parts only"),
        (("--rows", "-1"), "--pipeline, --tensor and --rows must be 1 or more"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    ran = planned(author_directory(tmp_path), *options)
    assert ran.returncode == 1
    assert words in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert ran.stdout == ""


def run_cli(*arguments: str) -> tuple[int, str]:
    """What the command prints, on a wide terminal."""
    if "plan" not in {command.callback.__name__ for command in cli.app.registered_commands if command.callback is not None}:
        cli._register_commands()
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["plan", *arguments])
    return result.exit_code, result.output if result.exception is None or result.exit_code == 0 else str(result.exception)


def test_the_command_shows_a_table(tmp_path: Path) -> None:
    status, shown = run_cli(str(author_directory(tmp_path)), "--pipeline", "2", "--rows", "4")
    assert status == 0, shown
    assert "net: pipeline 2 x tensor 1" in shown
    assert "For x [4], w [4] on cpu, " in shown
    assert "one rank alone: 0 MiB of weights" in shown
    assert "Cut, in 4 micro-batches:" in shown
    assert "no cut after net.embed" in shown


def test_the_command_prints_json(tmp_path: Path) -> None:
    status, shown = run_cli(str(author_directory(tmp_path)), "--pipeline", "2", "--json")
    assert status == 0, shown
    assert [rank["stage"] for rank in json.loads(shown)["ranks"]] == [0, 1]


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    assert "has no model 'nowhere'; it has:" in run_cli("nowhere", "--models-dir", str(MODELS))[1]
    code = NET.replace("context.load_into(self.net,", "self.net = context.load_into(None,")
    status, said = run_cli(str(author_directory(tmp_path, code=code)), "--pipeline", "2")
    assert status == 1
    assert "the model raised AttributeError" in said
    assert "(model.py:" in said


def test_help_teaches() -> None:
    status, shown = run_cli("--help")
    assert status == 0
    for example in ("tensorway plan minilm --pipeline 2", "parallel: {pipeline: 2, tensor: 1}"):
        assert example in shown


@pytest.mark.models
def test_what_stays_whole_is_said() -> None:
    both = ("--pipeline", "2", "--tensor", "2", "--rows", "1")
    asked = (("smollm2", *both), ("resnet50", *both), ("silero-vad", "--pipeline", "2"))
    with ThreadPoolExecutor() as threads:
        smollm2, resnet50, silero_vad = threads.map(lambda one: planned(MODELS / one[0], *one[1:]), asked)
    plan = json.loads(smollm2.stdout)
    assert any("9 heads and 3 key/value heads do not divide by 2" in line for line in plan["not_cut"])
    assert [rank["shard"] for rank in plan["ranks"]] == [0, 1, 0, 1]
    # The sum of each of the 30 MLPs.
    assert sum(rank["num_sums"] for rank in plan["ranks"] if rank["shard"] == 0) == 30
    resnet = json.loads(resnet50.stdout)
    assert any("nothing of resnet50 can be cut into 2 shards" in line for line in resnet["not_cut"])
    assert any("each rank makes the whole model at load" in line for line in resnet["notes"])
    assert "a TorchScript module runs as one compiled program" in silero_vad.stderr

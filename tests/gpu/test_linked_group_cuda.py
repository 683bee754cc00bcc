"""Ranks on CUDA devices: activations by device maps (CUDA IPC where both see both devices), sums by NCCL. Needs a GPU; two for shards."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
_SCRIPT = Path(__file__).parents[1] / "unit" / "worker" / "linked_rank.py"


def run(folder: Path, pipeline: int, tensor: int, program: str) -> str:
    """What the leader prints. Every rank has a device of its own where there are enough, else they share the first."""
    count = torch.cuda.device_count()
    processes: list[subprocess.Popen[str]] = []
    for rank in range(pipeline * tensor):
        order = [rank % count, *(one for one in range(count) if one != rank % count)]
        environment = {**os.environ, "LINKED_DEVICE": "cuda:0", "CUDA_VISIBLE_DEVICES": ",".join(map(str, order))}
        command = [sys.executable, str(_SCRIPT), str(rank), str(pipeline), str(tensor), str(folder), program]
        with (folder / f"rank-{rank}.log").open("w") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            processes.append(subprocess.Popen(command, text=True, env=environment, **pipes))
    try:
        output, _ = processes[0].communicate(timeout=100)
        assert output, (folder / "rank-0.log").read_text()
        return output.splitlines()[-1]
    finally:
        for process in processes:
            process.kill()
        for process in processes[1:]:
            process.communicate()


@pytest.mark.parametrize("pipeline", [2, 4])
def test_a_pipeline_of_devices_equals_the_whole_model(tmp_path: Path, pipeline: int) -> None:
    assert '"difference": 0.0' in run(tmp_path, pipeline, 1, "steps")


def test_gradients_come_back_through_devices(tmp_path: Path) -> None:
    assert '"jobs": 6' in run(tmp_path, 2, 1, "gradients")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL refuses two ranks on one device")
def test_shards_on_two_devices(tmp_path: Path) -> None:
    assert '"steps": 8' in run(tmp_path, 1, 2, "steps")


def test_a_killed_rank_gives_its_device_memory_back(tmp_path: Path) -> None:
    free_before, _ = torch.cuda.mem_get_info(0)
    run(tmp_path, 2, 1, "steps")
    deadline = time.monotonic() + 10
    while torch.cuda.mem_get_info(0)[0] < free_before - (64 << 20):
        assert time.monotonic() < deadline, "device memory did not come back"
        time.sleep(0.1)

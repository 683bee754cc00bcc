"""The memory guard: what it learns, what it refuses, and that a real shortage costs no more than the batch."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tensorway.errors import ModelFailed, OutOfMemory
from tensorway_worker.engines.port import model_error
from tensorway_worker.rank.memory import GuardedRun, HostMeter, MemoryGuard

MIB = 1 << 20


class Bench:
    """A meter whose reading is set by hand: the peak of a step is a function of its inputs."""

    def __init__(self, limit: int) -> None:
        self.room, self.now, self.kept = limit, 0, 0

    def used(self) -> int:
        return self.now

    def limit(self) -> int:
        return self.room

    def release(self) -> None:
        self.now = self.kept = 0

    def begin(self) -> None:
        self.now = self.kept

    def peak(self) -> int:
        return self.now


def one_step(guard: MemoryGuard, meter: Bench, size: int, peak: int) -> None:
    """A step on so many bytes, at whose peak so many are in use."""
    inputs = {"x": torch.zeros(size, dtype=torch.uint8)}
    guard.begin(inputs)
    meter.now = peak
    guard.end(inputs)


def learnt(limit: int, peaks: dict[int, int]) -> tuple[MemoryGuard, Bench]:
    meter = Bench(limit)
    guard = MemoryGuard(meter)
    for size, peak in peaks.items():
        one_step(guard, meter, size, peak)
    return guard, meter


def test_a_line_through_the_warm_up_refuses_what_is_beyond_the_limit() -> None:
    guard, meter = learnt(2000, {10: 1000, 110: 1500})
    assert guard.predict(60) == 1250
    guard.check({"x": torch.zeros(180, dtype=torch.uint8)})
    with pytest.raises(OutOfMemory, match="send less at once"):
        guard.check({"x": torch.zeros(200, dtype=torch.uint8)})
    meter.room = 10_000
    guard.check({"x": torch.zeros(200, dtype=torch.uint8)})


def test_a_step_above_the_line_lifts_it() -> None:
    guard, _ = learnt(10_000, {10: 1000, 110: 1500, 200: 4950})
    assert guard.predict(200) == 4950
    with pytest.raises(OutOfMemory):
        guard.check({"x": torch.zeros(450, dtype=torch.uint8)})


def test_what_the_allocator_kept_of_a_large_step_is_not_taken_for_a_small_ones_need() -> None:
    guard, meter = learnt(10_000, {10: 1000, 110: 1500, 1000: 6000})
    meter.now = meter.kept = 6000
    # As high as before, and a little higher: the pieces that are kept do not always fit.
    for peak in (6000, 6400, 6700):
        one_step(guard, meter, 10, peak)
    assert guard.predict(10) == 1000
    assert guard.predict(1000) == 6000


def test_what_is_kept_is_given_back_before_a_step_that_does_not_fit_beside_it() -> None:
    guard, meter = learnt(10_000, {10: 1000, 1000: 6000})
    meter.now = meter.kept = 6000
    one_step(guard, meter, 900, 5400)
    assert meter.kept == 0
    assert guard.predict(1000) == 6000


def test_a_small_step_above_the_line_lifts_all_of_it_alike() -> None:
    guard, meter = learnt(10_000, {10: 1000, 110: 1500})
    meter.now = meter.kept = 300
    one_step(guard, meter, 20, 1500)
    assert (guard.predict(20), guard.predict(110)) == (1050, 1500), "it found other pieces kept than the warm-up did: it teaches nothing"
    one_step(guard, meter, 20, 1100)
    assert meter.kept == 0
    assert (guard.predict(20), guard.predict(110)) == (1100, 1550)


def test_what_loading_took_for_a_moment_is_given_back_before_the_first_step() -> None:
    guard = MemoryGuard(HostMeter(own_limit=1 << 40))
    small = [torch.ones(32 * 1024, dtype=torch.uint8) for _ in range(2000)]
    last = torch.ones(32 * 1024, dtype=torch.uint8)
    before = HostMeter().used()
    del small
    guard.begin({})
    assert HostMeter().used() < before - 40 * MIB
    assert last.numel()


def test_nothing_is_refused_before_two_sizes_are_known() -> None:
    guard, _ = learnt(100, {10: 1000})
    guard.check({"x": torch.zeros(10_000, dtype=torch.uint8)})


def test_the_host_meter_sees_what_a_step_takes() -> None:
    meter = HostMeter(own_limit=123)
    assert meter.limit() == 123
    before = meter.used()
    meter.begin()
    taken = torch.ones(64 * MIB, dtype=torch.uint8)
    assert meter.peak() >= before + 60 * MIB
    del taken
    # A process that has freed much before may keep this, too.
    meter.release()
    meter.begin()
    assert meter.peak() < before + 60 * MIB


def test_a_guarded_run_measures_what_it_lets_through() -> None:
    guard = MemoryGuard(HostMeter(own_limit=1 << 40))
    run = GuardedRun(guard, lambda inputs: {"y": inputs["x"].repeat(64) + 1}, checks=True)
    for size in (MIB, 4 * MIB):
        run({"x": torch.zeros(size, dtype=torch.uint8)})
    grown = guard.predict(8 * MIB) - guard.predict(4 * MIB)
    assert 4 * 40 * MIB < grown < 4 * 300 * MIB


def test_shortage_of_memory_is_told_apart_from_a_models_own_failure() -> None:
    here = Path(__file__).parent
    assert isinstance(model_error(MemoryError("no"), here, "forward"), OutOfMemory)
    assert isinstance(model_error(torch.OutOfMemoryError("CUDA out of memory"), here, "forward"), OutOfMemory)
    assert isinstance(model_error(RuntimeError("shape mismatch"), here, "forward"), ModelFailed)


_STARVED = """
    import resource, sys
    from pathlib import Path
    import torch
    from tensorway_worker.engines.port import model_error
    from tensorway_worker.rank.memory import HostMeter, MemoryGuard, GuardedRun
    torch.set_num_threads(1)
    torch.zeros(1) + 1
    size = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20), resource.RLIM_INFINITY))
    try:
        torch.ones(1 << 30)
    except Exception as error:
        print(type(model_error(error, Path("."), "forward")).__name__)
    guard = MemoryGuard(HostMeter())
    print(guard.is_limited)
    run = GuardedRun(guard, lambda inputs: {"y": (inputs["x"].repeat(16) + 1)[:1]}, checks=True)
    for size in (1 << 16, 1 << 20):
        run({"x": torch.zeros(size, dtype=torch.uint8)})
    try:
        run({"x": torch.zeros(32 << 20, dtype=torch.uint8)})
    except Exception as error:
        print(type(error).__name__, str(error)[:40])
    print(run({"x": torch.zeros(1 << 20, dtype=torch.uint8)})["y"].item())
"""


def test_a_process_with_a_real_limit() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(_STARVED)], capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["OutOfMemory", "True"], done.stdout + done.stderr
    assert lines[2].startswith("OutOfMemory the step is predicted to need"), lines
    assert lines[3] == "1"

"""The memory of one rank: how much it has, how much a step takes, and whether the next one fits.

On a CPU memory is the resident set, and its limit the tightest of the model's own `memory_limit_mb`, the control group's and the address
space limit of the process; on CUDA it is what torch's allocator holds, and the limit is the device.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

import torch

from tensorway.errors import OutOfMemory
from tensorway.model import Inputs, Outputs, Value
from tensorway.model_directory import ModelDirectory

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
#: Writing this to clear_refs makes the peak of the resident set start afresh (proc(5)).
_RESET_PEAK: Final = b"5"
#: Share of the limit that steps may fill: the rest is for what predictions miss.
_SAFE_SHARE: Final = 0.95
_CGROUP: Final = Path("/sys/fs/cgroup")


class Meter(Protocol):
    """Measures a device's memory, bytes."""

    def used(self) -> int:
        """In use now."""

    def limit(self) -> int:
        """Most that may be in use; 0 where nothing limits it."""

    def release(self) -> None:
        """Gives back what the allocator keeps without using it, where that counts as used."""

    def begin(self) -> None:
        """Has `peak` start afresh."""

    def peak(self) -> int:
        """Most that was in use since `begin`."""


class HostMeter:
    """The resident set of this process."""

    def __init__(self, own_limit: int = 0) -> None:
        self._own_limit = own_limit
        self._cgroup = _memory_cgroup()

    def used(self) -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES

    def limit(self) -> int:
        limits = [self._own_limit, self._cgroup_room(), self._address_room()]
        return min((limit for limit in limits if limit), default=0)

    def release(self) -> None:
        # Freed memory stays with the process (`MALLOC_SETTINGS`), what loading took for a moment included.
        ctypes.CDLL(None).malloc_trim(0)

    def begin(self) -> None:
        Path("/proc/self/clear_refs").write_bytes(_RESET_PEAK)

    def peak(self) -> int:
        return _status_bytes("VmHWM")

    def _cgroup_room(self) -> int:
        """What this process may grow to before its control group is full: other processes of the group count, too."""
        if self._cgroup is None:
            return 0
        limit, current = self._cgroup
        text = limit.read_text(encoding="ascii").strip()
        # Version 1 writes "no limit" as a number near 2^63.
        if text == "max" or int(text) >= 1 << 60:
            return 0
        return max(1, int(text) - int(current.read_text(encoding="ascii"))) + self.used()

    def _address_room(self) -> int:
        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft == resource.RLIM_INFINITY:
            return 0
        return max(1, soft - _status_bytes("VmSize")) + self.used()


class CudaMeter:
    """What torch's allocator holds on this rank's device."""

    def __init__(self, device: str, own_limit: int = 0) -> None:
        self._device = torch.device(device)
        self._own_limit = own_limit

    def used(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def limit(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        room = free + torch.cuda.memory_reserved(self._device)
        return min(room, self._own_limit) if self._own_limit else room

    def release(self) -> None:
        """What is cached does not count as used."""

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)


class MemoryGuard:
    """Learns what steps take, and refuses one that is predicted not to fit. Used in the torch thread, one step at a time; `check` anywhere.

    What a step takes beyond what is in use before it is thought to grow in a straight line with the bytes of its inputs. The line goes
    through the first step seen (the warm-up's) and the largest, and a smaller step that was above it lifts it as a whole, so that what
    grows faster (attention over long inputs) is learnt as it comes: a slope taken from a small step would be far off where steps are large.

    A CPU's allocator keeps what steps have freed, so the resident set shows the largest of the past, and pieces between. Hence a step that
    is larger than all before it is measured after the allocator has given back what it keeps, and one that would not fit beside that
    begins so, too. Only such steps teach: what another takes depends on the holes that it found. One that seems to take more than predicted
    has the next one begin so.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        #: In use between steps, once the allocator keeps nothing.
        self._idle = 0
        self._first: tuple[int, int] | None = None
        #: Bytes that a step takes with no input at all, and for each byte of input.
        self._fixed = 0.0
        self._slope = 0.0
        #: Bytes of input of the largest step.
        self._largest = -1
        self._used_before = 0
        #: Whether the step began with nothing kept by the allocator; whether the next one must.
        self._is_clean = self._wants_clean = False
        self._limit = meter.limit()

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit at all: without one, nothing is measured."""
        return self._limit > 0

    def check(self, inputs: Mapping[str, Value]) -> None:
        """Raises OutOfMemory, naming the prediction and the limit, where a step on `inputs` is predicted not to fit."""
        if not self._slope:
            return
        limit = self._safe_limit()
        predicted = self.predict(num_bytes(inputs))
        if predicted > limit > 0:
            raise OutOfMemory(
                f"the step is predicted to need {_mib(predicted)} of memory, and {_mib(limit)} may be used; send less at once"
            )

    def predict(self, input_bytes: int) -> int:
        """Peak of a step on that many bytes of input, bytes."""
        return self._idle + self._need(input_bytes)

    def begin(self, inputs: Mapping[str, Value]) -> None:
        """Before a step."""
        size = num_bytes(inputs)
        self._used_before = self._meter.used()
        self._is_clean = self._wants_clean or size > self._largest or self._used_before + self._need(size) > self._safe_limit()
        if self._is_clean:
            self._meter.release()
            self._used_before = self._idle = self._meter.used()
        self._meter.begin()

    def end(self, inputs: Mapping[str, Value]) -> None:
        """After a step that came to its end."""
        size, need = num_bytes(inputs), max(0, self._meter.peak() - self._used_before)
        if self._first is None:
            self._first, self._fixed = (size, need), float(need)
        elif size > self._largest:
            self._slope = max(1.0, (need - self._first[1]) / (size - self._first[0]))
            self._fixed = max(0.0, self._first[1] - self._slope * self._first[0])
        elif need > self._need(size):
            self._fixed += need - self._need(size) if self._is_clean else 0
        self._wants_clean = not self._is_clean and need > self._need(size)
        self._largest = max(self._largest, size)

    def _need(self, input_bytes: int) -> int:
        return int(self._fixed + self._slope * input_bytes)

    def _safe_limit(self) -> int:
        return int(self._meter.limit() * _SAFE_SHARE)


class GuardedRun:
    """An engine's `run` that is measured, and refused where it is predicted not to fit. In the torch thread.

    Shards of one stage must not decide each for itself: one that refuses leaves the others waiting for its sums. So with `checks` off it
    only measures, and the leader asks `guard.check` before it sends the step to anybody.
    """

    def __init__(self, guard: MemoryGuard, run: Callable[[Inputs], Outputs], checks: bool) -> None:
        self._guard = guard
        self._run = run
        self._checks = checks

    def __call__(self, inputs: Inputs) -> Outputs:
        if self._checks:
            self._guard.check(inputs)
        self._guard.begin(inputs)
        outputs = self._run(inputs)
        self._guard.end(inputs)
        return outputs


def open_guard(directory: ModelDirectory, device: str) -> MemoryGuard | None:
    """The guard of a rank of this model; None where nothing limits its memory."""
    guard = MemoryGuard(open_meter(device, directory.yaml.memory_limit_mb << 20))
    return guard if guard.is_limited else None


def open_meter(device: str, own_limit: int = 0) -> Meter:
    """The meter of `device`; `own_limit` is the model's own, bytes, 0 for none."""
    return HostMeter(own_limit) if device == "cpu" else CudaMeter(device, own_limit)


def num_bytes(values: Mapping[str, Value]) -> int:
    """Bytes of all tensors."""
    return sum(value.nbytes for value in values.values() if isinstance(value, torch.Tensor))


def _memory_cgroup() -> tuple[Path, Path] | None:
    """(limit, current) of this process's control group, of version 2 or 1; None where there is none."""
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found = (_CGROUP / path.lstrip("/") / "memory.max", _CGROUP / path.lstrip("/") / "memory.current")
        elif controllers == "memory":
            folder = _CGROUP / "memory" / path.lstrip("/")
            found = (folder / "memory.limit_in_bytes", folder / "memory.usage_in_bytes")
        else:
            continue
        if all(file.exists() for file in found):
            return found
    return None


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"

"""Facts about processes that every service shares: memory settings, and dying with the parent."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping
from typing import Final

#: glibc malloc, read by libc when a process starts, hence the environment. Large blocks stay mapped between requests: otherwise page faults
#: dominate big tensors. One arena: a thread's own cannot hold blocks of 64 MiB (glibc maps each anew, and every use of it faults page by
#: page), and activations are that large; with it ResNet-50 runs 32 rows 1.7 times faster (benchmarks/malloc.md).
MALLOC_SETTINGS: Final[Mapping[str, str]] = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}

_PR_SET_PDEATHSIG: Final = 1


def die_with_parent(signal_number: signal.Signals, parent_pid: int | None = None) -> None:
    """Asks the kernel to send this process `signal_number` when its parent ends, however it ends (prctl(2)). Linux only.

    With `parent_pid`, a parent that has ended before the request took effect is noticed too.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent_pid is not None and os.getppid() != parent_pid:
        os.kill(os.getpid(), signal_number)

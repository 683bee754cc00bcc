"""Chrome traces of several ranks as one: a process for each rank, on one clock. Pure.

Format: "Trace Event Format" (Chromium project). torch writes `ts` in microseconds after `baseTimeNanoseconds`, which is on the wall clock.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

#: Devices of a rank are processes of their own in a trace; their numbers begin here, so many for each rank.
_FIRST_DEVICE: Final = 1000
_DEVICES: Final = 100
#: Events that tie others together by their id, which two ranks may have chosen alike.
_TYING: Final = frozenset("stfbenSFTPO")


@dataclass(frozen=True, slots=True)
class RankTrace:
    """What one rank has recorded."""

    rank: int
    #: How it is called in the merged trace.
    label: str
    #: Chrome trace, JSON gzipped.
    content: bytes
    #: By how much its clock is ahead of the leader's, microseconds.
    ahead_us: float = 0.0


def merge(traces: Sequence[RankTrace]) -> bytes:
    """One trace, JSON gzipped, with process `rank` for each rank. The first one's base time is that of all."""
    merged: dict[str, Any] = {}
    events: list[dict[str, Any]] = []
    for trace in traces:
        document = json.loads(gzip.decompress(trace.content))
        base_ns = int(document.get("baseTimeNanoseconds", 0))
        if not merged:
            merged = {key: value for key, value in document.items() if key not in ("traceEvents", "traceName")}
        shift_us = (base_ns - int(merged.get("baseTimeNanoseconds", 0))) / 1e3 - trace.ahead_us
        events += _processes(trace, document["traceEvents"])
        events += (_moved(event, trace.rank, shift_us) for event in document["traceEvents"] if _is_kept(event))
    merged["traceEvents"] = events
    return gzip.compress(json.dumps(merged, separators=(",", ":")).encode(), 6)


def _is_kept(event: dict[str, Any]) -> bool:
    """Names of processes are given anew; what torch says about the whole trace belongs to none."""
    return isinstance(event.get("pid"), int) and not (event.get("ph") == "M" and str(event.get("name", "")).startswith("process_"))


def _processes(trace: RankTrace, events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Names of the rank's processes: itself, and its devices."""
    own = _own_pid(events)
    found = sorted({event["pid"] for event in events if isinstance(event.get("pid"), int)})
    named: list[dict[str, Any]] = []
    for pid in found:
        label = trace.label if pid == own or pid >= _DEVICES else f"{trace.label}, device {pid}"
        number = _number(pid, trace.rank)
        for name, arguments in (("process_name", {"name": label}), ("process_sort_index", {"sort_index": number})):
            event = {"name": name, "ph": "M", "ts": 0, "pid": number, "tid": 0, "args": arguments}
            if event not in named:
                named.append(event)
    return named


def _own_pid(events: Sequence[dict[str, Any]]) -> int:
    return next((event["pid"] for event in events if event.get("cat") == "cpu_op"), -1)


def _number(pid: int, rank: int) -> int:
    """Small numbers are devices, others the process itself, as torch writes them."""
    return rank if pid >= _DEVICES else _FIRST_DEVICE + rank * _DEVICES + pid


def _moved(event: dict[str, Any], rank: int, shift_us: float) -> dict[str, Any]:
    moved = {**event, "pid": _number(event["pid"], rank)}
    if "ts" in moved:
        moved["ts"] = float(moved["ts"]) + shift_us
    if "id" in moved and event.get("ph") in _TYING:
        moved["id"] = f"{rank}.{moved['id']}"
    return moved

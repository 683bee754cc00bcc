"""Chrome traces of several ranks become one."""

from __future__ import annotations

import gzip
import json
from typing import Any

from tensorway_worker.rank.trace_merge import RankTrace, merge


def written(pid: int, base_ns: int, *events: dict[str, Any]) -> bytes:
    """As torch writes them, with its own events about the whole trace."""
    named = [
        {"name": "process_name", "ph": "M", "ts": 0, "pid": pid, "tid": 0, "args": {"name": "python"}},
        {"name": "thread_name", "ph": "M", "ts": 0, "pid": pid, "tid": 7, "args": {"name": "torch"}},
        {"name": "process_sort_index", "ph": "M", "ts": 0, "pid": "Spans", "tid": 0, "args": {"sort_index": 1}},
        {"name": "Record Window End", "ph": "i", "ts": 0, "pid": "", "tid": ""},
    ]
    document = {"schemaVersion": 1, "baseTimeNanoseconds": base_ns, "traceName": "/tmp/secret", "traceEvents": [*named, *events]}
    return gzip.compress(json.dumps(document).encode())


def operator(pid: int, ts: float) -> dict[str, Any]:
    return {"name": "aten::mm", "ph": "X", "cat": "cpu_op", "pid": pid, "tid": 7, "ts": ts, "dur": 1.0}


def test_ranks_are_processes_on_one_clock() -> None:
    flow = {"name": "ac2g", "ph": "s", "id": 5, "cat": "ac2g", "pid": 900, "tid": 7, "ts": 11.0}
    kernel = {"name": "gemm", "ph": "X", "cat": "kernel", "pid": 0, "tid": 3, "ts": 12.0, "dur": 2.0}
    merged = json.loads(gzip.decompress(merge([
        RankTrace(0, "rank 0", written(900, 1_000_000, operator(900, 10.0), flow, kernel)),
        # Another process with the same number, another base, and a clock that is 50 µs ahead.
        RankTrace(1, "rank 1", written(900, 3_000_000, operator(900, 10.0), {**flow}), ahead_us=50.0),
    ])))
    assert merged["baseTimeNanoseconds"] == 1_000_000
    assert "traceName" not in merged
    events = merged["traceEvents"]
    assert {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"} == {
        0: "rank 0", 1000: "rank 0, device 0", 1: "rank 1",
    }
    assert {event["pid"]: event["ts"] for event in events if event.get("cat") == "cpu_op"} == {0: 10.0, 1: 10.0 + 2000.0 - 50.0}
    assert {event["id"] for event in events if event["name"] == "ac2g"} == {"0.5", "1.5"}
    assert [event["pid"] for event in events if event["name"] == "gemm"] == [1000]
    assert [event["pid"] for event in events if event["name"] == "thread_name"] == [0, 1]
    assert all(isinstance(event["pid"], int) for event in events)

"""A `torch.distributed.Store` whose operations travel to the node and back over the rank's pipes (`meeting.py` says how).

Operations are written, whole, to the descriptor that `TENSORWAY_STORE_FD` names; they may block there, for they come from the torch
thread or from torch's own threads, never from the loop. Answers arrive as lines on standard input, which the loop reads
(`node_pipe.watch_node`).
"""

from __future__ import annotations

import json
import os
import threading
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, Final

from torch import distributed
from torch._C._distributed_c10d import Store

from tensorway_worker.meeting import MAX_LINE_BYTES, Operation
from tensorway_worker.rank.launch import STORE_FD_VARIABLE

#: The node answers an operation that waits at its timeout; a node that does not answer at all is given this much more.
_SLACK_S: Final = 10.0


@dataclass(slots=True, eq=False)
class _Asked:
    """An operation that waits for its answer."""

    came: threading.Event = field(default_factory=threading.Event)
    answer: Mapping[str, Any] = field(default_factory=dict)


class NodeStore(Store):
    """The store of this rank's epoch. Every failure is a `torch.distributed.DistStoreError`, which is a RuntimeError.

    `timeout` and `set_timeout` are torch's own: the seconds that `get` and `wait` wait where the call names none.
    """

    #: torch's own property.
    timeout: timedelta

    def __init__(self, environment: Mapping[str, str], timeout_s: float) -> None:
        super().__init__()
        self.set_timeout(timedelta(seconds=timeout_s))
        self._descriptor = int(environment.get(STORE_FD_VARIABLE, "-1"))
        self._ids = count(1)
        self._asked: dict[int, _Asked] = {}
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._ended = "" if self._descriptor >= 0 else f"this rank has no node to meet others through: {STORE_FD_VARIABLE} is not set"

    def take_line(self, line: bytes) -> None:
        """An answer that came on standard input. In the loop's thread; never blocks. Raises ValueError where it is none."""
        answer = json.loads(line)
        with self._lock:
            asked = self._asked.pop(int(answer["id"]), None)
        # An answer that nobody waits for any more came after its operation's last moment.
        if asked is not None:
            asked.answer = answer
            asked.came.set()

    def close(self, reason: str) -> None:
        """Fails what waits, and whatever still comes. From any thread; harmless to repeat."""
        with self._lock:
            self._ended = self._ended or reason
            waiting = list(self._asked.values())
            self._asked.clear()
        for asked in waiting:
            asked.answer = {"error": self._ended}
            asked.came.set()

    def set(self, key: str, value: str | bytes) -> None:
        self._ask("set", [key], [value])

    def get(self, key: str) -> bytes:
        return self._ask_values("get", [key])[0]

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        return self._ask_values("compare_set", [key], [expected, desired])[0]

    def add(self, key: str, amount: int) -> int:
        return int(self._ask("add", [key], amount=amount)["number"])

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._ask("check", keys)["number"])

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._ask("wait", keys, timeout=timeout)

    def delete_key(self, key: str) -> bool:
        return bool(self._ask("delete_key", [key])["number"])

    def num_keys(self) -> int:
        return int(self._ask("num_keys", [])["number"])

    #: The names by which torch's C++ calls these two.
    deleteKey = delete_key
    getNumKeys = num_keys

    def append(self, key: str, value: str | bytes) -> None:
        self._ask("append", [key], [value])

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return self._ask_values("multi_get", keys)

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        self._ask("multi_set", keys, values)

    def has_extended_api(self) -> bool:
        """Whether append, multi_get and multi_set are there."""
        return True

    def clone(self) -> NodeStore:
        """Itself: it may be used from any number of threads at once."""
        return self

    def _ask_values(self, op: str, keys: Sequence[str], values: Sequence[str | bytes] = ()) -> list[bytes]:
        return [b64decode(value) for value in self._ask(op, keys, values)["values"]]

    def _ask(
        self, op: str, keys: Sequence[str], values: Sequence[str | bytes] = (), amount: int = 0, timeout: timedelta | None = None
    ) -> Mapping[str, Any]:
        """Sends one operation and waits for its answer, from whatever thread."""
        timeout_s = (self.timeout if timeout is None else timeout).total_seconds()
        content = tuple(value.encode() if isinstance(value, str) else bytes(value) for value in values)
        line = Operation(next(self._ids), op, tuple(keys), content, amount, timeout_s)
        asked = self._send(line)
        if not asked.came.wait(timeout_s + _SLACK_S):
            with self._lock:
                self._asked.pop(line.id, None)
            raise distributed.DistStoreError(f"the node did not answer {op} of {', '.join(keys)} in {timeout_s + _SLACK_S:.1f} s")
        if "error" in asked.answer:
            raise distributed.DistStoreError(str(asked.answer["error"]))
        return asked.answer

    def _send(self, operation: Operation) -> _Asked:
        line = operation.to_line()
        if len(line) > MAX_LINE_BYTES:
            raise distributed.DistStoreError(f"{operation.op} of {', '.join(operation.keys)}: {len(line)} bytes are too many for the store")
        asked = _Asked()
        with self._lock:
            if self._ended:
                raise distributed.DistStoreError(self._ended)
            self._asked[operation.id] = asked
        try:
            with self._writing:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self.close(f"the node has closed the store's pipe: {error}")
        return asked

"""Where the ranks of one epoch meet: the key-value store behind `torch.distributed.Store`, kept by the node that owns the group.

torch's own stores do not fit: a TCPStore listens on every interface, whatever it is told, and a file cannot cross machines. Here a rank's
operations come over its pipe to the node (`rank/node_store.py`), or over the stream from the node that hosts it; nothing listens anywhere.

One operation and its answer are one JSON line each; values are base64:

    {"id": 7, "op": "get", "keys": ["a"], "timeout_s": 30.0}                      →  {"id": 7, "values": ["eA=="]}
    {"id": 8, "op": "wait", "keys": ["a", "b"], "timeout_s": 30.0}                →  {"id": 8, "error": "waited 30 s for b"}
    {"id": 9, "op": "compare_set", "keys": ["a"], "values": ["eA==", "eQ=="]}     →  {"id": 9, "values": ["eQ=="]}
    {"id": 10, "op": "add", "keys": ["n"], "amount": 2}                           →  {"id": 10, "number": 2}

The meanings are those of torch's TCPStore. Touches nothing: time comes in through `call_later`, answers leave through `answer`.
"""

from __future__ import annotations

import binascii
import json
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from tensorway.errors import InvalidRequest

MAX_KEYS: Final = 65_536
#: Of all keys and values together.
MAX_BYTES: Final = 64 * 1024 * 1024
#: Longest line of an operation or an answer; a value may have about three quarters of it.
MAX_LINE_BYTES: Final = 4 * 1024 * 1024
_NAMED_KEYS: Final = 5

#: Takes one answer: a line of JSON, with its newline.
Answer = Callable[[bytes], None]


class Timer(Protocol):
    """What `call_later` returns."""

    def cancel(self) -> None:
        """The call is not made any more."""


CallLater = Callable[[float, Callable[[], None]], Timer]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a rank on the store."""

    id: int
    op: str
    keys: tuple[str, ...] = ()
    values: tuple[bytes, ...] = ()
    amount: int = 0
    #: Most seconds that `get`, `multi_get` and `wait` wait for their keys.
    timeout_s: float = 0.0

    def to_line(self) -> bytes:
        words = {"id": self.id, "op": self.op, "keys": self.keys, "values": [b64encode(value).decode() for value in self.values],
                 "amount": self.amount, "timeout_s": self.timeout_s}
        return json.dumps(words).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Operation:
        """Raises InvalidRequest where the line is no operation."""
        try:
            words = json.loads(line)
            return cls(
                int(words["id"]), str(words["op"]), tuple(map(str, words.get("keys", ()))),
                tuple(b64decode(value, validate=True) for value in words.get("values", ())),
                int(words.get("amount", 0)), float(words.get("timeout_s", 0.0)),
            )
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
            raise InvalidRequest(f"a line on the store's pipe is no operation: {error}", field="operation") from error


@dataclass(slots=True, eq=False)
class _Waiter:
    """An operation that is answered when its keys are there."""

    operation: Operation
    answer: Answer
    missing: set[str]
    timer: Timer | None = None


@dataclass(slots=True, eq=False)
class Meeting:
    """The store of one epoch. Lives in the loop; every operation is answered exactly once, at the latest by `end`."""

    call_later: CallLater
    max_keys: int = MAX_KEYS
    max_bytes: int = MAX_BYTES
    _values: dict[str, bytes] = field(default_factory=dict)
    _num_bytes: int = 0
    _waiters: set[_Waiter] = field(default_factory=set)
    _ended: str = ""

    def take(self, line: bytes, answer: Answer) -> None:
        """One operation; `answer` is called now, or later where it has to wait. Raises InvalidRequest where `line` is none."""
        operation = Operation.from_line(line)
        if self._ended:
            answer(_failure(operation, self._ended))
        elif operation.op in ("get", "multi_get", "wait"):
            self._wait(operation, answer)
        else:
            try:
                answer(_success(operation, **self._apply(operation)))
            except (ValueError, IndexError) as error:
                answer(_failure(operation, f"{operation.op}: {error}"))

    def end(self, reason: str) -> None:
        """The epoch is over: whatever waits fails with `reason`, and so does all that still comes."""
        self._ended = reason
        for waiter in tuple(self._waiters):
            self._drop(waiter)
            waiter.answer(_failure(waiter.operation, reason))
        self._values.clear()
        self._num_bytes = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiters)

    def _apply(self, operation: Operation) -> dict[str, Any]:
        """An operation that waits for nothing. Raises ValueError where it does not fit, IndexError where it is incomplete."""
        op, keys, values = operation.op, operation.keys, operation.values
        if op == "set":
            self._put(keys[0], values[0])
        elif op == "multi_set":
            for key, value in zip(keys, values, strict=True):
                self._put(key, value)
        elif op == "append":
            self._put(keys[0], self._values.get(keys[0], b"") + values[0])
        elif op == "compare_set":
            return {"values": [self._compare_set(keys[0], values[0], values[1])]}
        elif op == "add":
            number = int(self._values.get(keys[0], b"0")) + operation.amount
            self._put(keys[0], str(number).encode())
            return {"number": number}
        elif op == "check":
            return {"number": int(all(key in self._values for key in keys))}
        elif op == "delete_key":
            return {"number": int(self._remove(keys[0]))}
        elif op == "num_keys":
            return {"number": len(self._values)}
        else:
            raise ValueError("the store has no such operation")
        return {}

    def _compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """Sets `desired` where the value is `expected` (an absent key counts as empty); returns what a TCPStore returns."""
        current = self._values.get(key)
        if current is None and expected:
            return expected
        if current is None or current == expected:
            self._put(key, desired)
            return desired
        return current

    def _put(self, key: str, value: bytes) -> None:
        old = self._values.get(key)
        growth = len(value) - len(old) if old is not None else len(key) + len(value)
        if old is None and len(self._values) >= self.max_keys:
            raise ValueError(f"the store is full: it holds {self.max_keys} keys")
        if self._num_bytes + growth > self.max_bytes:
            raise ValueError(f"the store is full: it would hold more than {self.max_bytes} bytes")
        self._values[key] = value
        self._num_bytes += growth
        for waiter in [waiter for waiter in self._waiters if key in waiter.missing]:
            waiter.missing.discard(key)
            if not waiter.missing:
                self._drop(waiter)
                self._answer_found(waiter.operation, waiter.answer)

    def _remove(self, key: str) -> bool:
        value = self._values.pop(key, None)
        if value is not None:
            self._num_bytes -= len(key) + len(value)
            # Who waits for several keys waits until all are there at once.
            for waiter in self._waiters:
                if key in waiter.operation.keys:
                    waiter.missing.add(key)
        return value is not None

    def _wait(self, operation: Operation, answer: Answer) -> None:
        missing = {key for key in operation.keys if key not in self._values}
        if not missing:
            self._answer_found(operation, answer)
            return
        waiter = _Waiter(operation, answer, missing)
        self._waiters.add(waiter)
        waiter.timer = self.call_later(operation.timeout_s, lambda: self._expire(waiter))

    def _expire(self, waiter: _Waiter) -> None:
        if waiter in self._waiters:
            self._drop(waiter)
            missing = sorted(waiter.missing)
            more = f" and {len(missing) - _NAMED_KEYS} more" if len(missing) > _NAMED_KEYS else ""
            names = ", ".join(missing[:_NAMED_KEYS])
            waiter.answer(_failure(waiter.operation, f"waited {waiter.operation.timeout_s:.1f} s in vain for {names}{more}"))

    def _drop(self, waiter: _Waiter) -> None:
        self._waiters.discard(waiter)
        if waiter.timer is not None:
            waiter.timer.cancel()

    def _answer_found(self, operation: Operation, answer: Answer) -> None:
        values = [] if operation.op == "wait" else [self._values[key] for key in operation.keys]
        answer(_success(operation, values=values))


def _success(operation: Operation, **found: Any) -> bytes:
    values = [b64encode(value).decode() for value in found.get("values", ())]
    return json.dumps({"id": operation.id, "values": values, "number": found.get("number", 0)}).encode() + b"\n"


def _failure(operation: Operation, reason: str) -> bytes:
    return json.dumps({"id": operation.id, "error": reason}).encode() + b"\n"

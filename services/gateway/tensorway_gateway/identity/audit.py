"""The audit log: one JSON object a line for every call that manages, and every credential that was refused.

Nothing waits for the disk: lines are written by a thread, in batches, and when they come faster than they can be written, or cannot be
written at all, serving goes on and the lines that were lost are counted.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

from tensorway_gateway.identity.quota import TokenBucket

_LOG = logging.getLogger(__name__)
_AUDIT_LOG = logging.getLogger("tensorway.audit")
_MAX_WAITING: Final = 10_000
#: Refused credentials beyond these are summed up: whoever guesses fills no disk.
_REFUSALS_PER_S: Final = 50.0
_REFUSALS_AT_ONCE: Final = 500.0


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """What somebody did, or was kept from."""

    principal: str
    action: str
    method: str
    model: str
    peer: str
    request_id: str
    #: allowed, refused, failed; or of a credential the word for what is wrong with it.
    outcome: str
    status: str
    #: The error's sentence; "" where there was none.
    detail: str = ""


class AuditLog:
    """To a file, or with path "" to the logger `tensorway.audit`. The file is opened anew for each batch, so that it may be moved away."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lines: deque[str] = deque()
        self._news = asyncio.Event()
        self._refusals = TokenBucket(_REFUSALS_PER_S, _REFUSALS_AT_ONCE, time.monotonic())
        self._num_unsaid = 0
        self._is_failing = False
        #: Whether the file ends in the middle of a line.
        self._is_torn = False
        #: Lines that could not be written.
        self.num_lost = 0

    def note(self, entry: AuditEntry) -> None:
        """Of a call that manages."""
        self._add(entry, {})

    def note_refusal(self, entry: AuditEntry) -> None:
        """Of a credential that was refused. Of very many in a short time only some are written, with the number of those that were not."""
        if self._refusals.take(1.0, time.monotonic()) > 0:
            self._num_unsaid += 1
            return
        more: dict[str, Any] = {"num_unsaid": self._num_unsaid} if self._num_unsaid else {}
        self._num_unsaid = 0
        self._add(entry, more)

    async def run(self) -> None:
        """Writes until cancelled; then `flush`."""
        while True:
            await self._news.wait()
            self._news.clear()
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            # A cancellation waits for the thread, or the lines would be lost.
            writing = asyncio.get_running_loop().run_in_executor(None, self._write, lines)
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                await writing
                raise

    def flush(self) -> None:
        """Writes what waits, at once; for the end."""
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        if lines:
            self._write(lines)

    def _add(self, entry: AuditEntry, more: dict[str, Any]) -> None:
        now_s = time.time()
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now_s))}.{int(now_s % 1 * 1000):03d}Z"
        fields = {name: getattr(entry, name) for name in entry.__slots__}
        fields = {name: value for name, value in fields.items() if value or name != "detail"} | more
        if not self._path:
            _AUDIT_LOG.info("%s of %s by %s: %s", entry.action, entry.method, entry.principal, entry.outcome, extra={"fields": fields})
        elif len(self._lines) >= _MAX_WAITING:
            self.num_lost += 1
        else:
            self._lines.append(json.dumps({"time": stamp, **fields}))
            self._news.set()

    def _write(self, lines: list[str]) -> None:
        """In a thread. Only one runs at a time."""
        content = b"\n" * self._is_torn + "".join(f"{line}\n" for line in lines).encode()
        num_written = 0
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                while num_written < len(content):
                    num_written += os.write(file, content[num_written:])
            finally:
                os.close(file)
        except OSError as error:
            num_whole = content[:num_written].count(b"\n") - (self._is_torn and num_written > 0)
            self.num_lost += len(lines) - num_whole
            self._is_torn = content[num_written - 1 : num_written] != b"\n" if num_written else self._is_torn
            if not self._is_failing:
                _LOG.error("the audit log %s cannot be written, and lines are lost until it can: %s", self._path, error.strerror)
            self._is_failing = True
        else:
            if self._is_failing:
                _LOG.warning("the audit log %s can be written again; %d lines were lost", self._path, self.num_lost)
            self._is_failing = self._is_torn = False

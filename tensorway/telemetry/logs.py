"""Logs: one JSON object a line for machines, short coloured text on a terminal. Structured fields travel in `extra={"fields": {...}}`."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, TextIO

#: What the setting `log_level` may be, the most talkative first.
LEVELS: Final = ("debug", "info", "warning", "error")

#: Libraries whose INFO lines say nothing about the mesh.
_QUIET: Final = ("asyncio", "aiohttp.access", "httpx", "urllib3", "filelock", "transformers")


class JsonFormatter(logging.Formatter):
    """One object a line: time (RFC 3339, UTC), level, service, logger, message, then the record's own fields."""

    def __init__(self, service: str, instance: str, fields: Mapping[str, object] | None = None) -> None:
        super().__init__()
        self._who = {"service": service, "instance": instance}
        self._fields = dict(fields or {})

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            **self._who,
            "logger": record.name,
            "message": record.getMessage(),
            **self._fields,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """`12:30:01 INFO gateway: message key=value`."""

    def __init__(self, service: str) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={value}" for key, value in getattr(record, "fields", {}).items())
        text = f"{self.formatTime(record, self.datefmt)} {record.levelname:<7} {self._service}: {record.getMessage()}"
        if fields:
            text = f"{text}  {fields}"
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        return text


def configure_logs(
    service: str, instance: str, level: str, format_: str, stream: TextIO | None = None, fields: Mapping[str, object] | None = None
) -> None:
    """Sends every log line of this process to `stream` (standard error), replacing what was configured before. `fields` are on each line
    of JSON."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    as_text = format_ == "text" or (format_ == "auto" and stream.isatty())
    handler.setFormatter(TextFormatter(service) if as_text else JsonFormatter(service, instance, fields))
    logging.getLogger().handlers[:] = [handler]
    set_level(level)


def set_level(level: str) -> None:
    """Shows lines of `level` (one of LEVELS) and above from here on, in the whole process."""
    root = logging.getLogger()
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


class LogLevel:
    """The level of this process, to be changed while it runs. Lives in the loop."""

    def __init__(self, configured: str, on_change: Callable[[str], None] | None = None) -> None:
        """`configured` is what it is, and goes back to; `on_change` hears of every change."""
        self._configured = configured
        self._on_change = on_change
        self._timer: asyncio.TimerHandle | None = None
        self.level = configured

    @property
    def next_level(self) -> str:
        """What it goes back to; empty where it stays."""
        return "" if self._timer is None else self._configured

    @property
    def next_in_s(self) -> float:
        """In how many seconds; 0 where it stays."""
        return 0.0 if self._timer is None else max(0.0, self._timer.when() - asyncio.get_running_loop().time())

    def change(self, level: str, seconds: float) -> str:
        """Sets `level`, one of LEVELS, for so many seconds, or for good where they are 0; returns what it was before."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        previous = self._set(level)
        if seconds > 0.0:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._go_back)
        return previous

    def _go_back(self) -> None:
        self._timer = None
        self._set(self._configured)

    def _set(self, level: str) -> str:
        previous, self.level = self.level, level
        set_level(level)
        # Said at a level that both show.
        severity = max(logging.getLevelName(level.upper()), logging.INFO)
        logging.getLogger(__name__).log(severity, "log level is %s", level, extra={"fields": {"previous": previous}})
        if self._on_change is not None:
            self._on_change(level)
        return previous

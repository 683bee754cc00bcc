"""Logs: one JSON object a line for machines, short coloured text on a terminal. Structured fields travel in `extra={"fields": {...}}`."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Final, TextIO

#: Libraries whose INFO lines say nothing about the mesh.
_QUIET: Final = ("asyncio", "aiohttp.access", "httpx", "urllib3", "filelock", "transformers")


class JsonFormatter(logging.Formatter):
    """One object a line: time (RFC 3339, UTC), level, service, logger, message, then the record's own fields."""

    def __init__(self, service: str, instance: str) -> None:
        super().__init__()
        self._who = {"service": service, "instance": instance}

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            **self._who,
            "logger": record.name,
            "message": record.getMessage(),
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


def configure_logs(service: str, instance: str, level: str, format_: str, stream: TextIO | None = None) -> None:
    """Sends every log line of this process to `stream` (standard error), replacing what was configured before."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    as_text = format_ == "text" or (format_ == "auto" and stream.isatty())
    handler.setFormatter(TextFormatter(service) if as_text else JsonFormatter(service, instance))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))

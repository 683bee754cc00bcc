"""Calls into other people's code from places that have nobody to raise to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ParamSpec

_LOG = logging.getLogger(__name__)

_P = ParamSpec("_P")


def call_guarded(what: str, callback: Callable[_P, object], *arguments: _P.args, **keywords: _P.kwargs) -> None:
    """Calls `callback`. What it raises is a bug of `what`, logged with its traceback: the RPCs beside it must not suffer."""
    try:
        callback(*arguments, **keywords)
    except Exception:  # noqa: BLE001 - a boundary: logged, and nobody above could do more
        _LOG.exception("%s raised", what)

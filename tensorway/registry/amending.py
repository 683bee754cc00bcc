"""Changing a document that others may change at the same time: read, change, compare-and-set, and again where another was first."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final

from tensorway.errors import Unavailable
from tensorway.registry.port import Registry

_MAX_TRIES: Final = 20
#: Longest pause before another try. A random part of it, so that rivals do not meet again and again.
_PAUSE_S: Final = 0.1


async def amend(registry: Registry, key: str, change: Callable[[bytes | None], bytes | None]) -> bytes | None:
    """Changes the document `key` so that no change of another is lost; returns what it is now.

    Args:
        change: the new document from the present one, None where there is none; called again where another was first. What it raises
            ends the attempt. It returns None to leave the document as it is.

    Raises Unavailable where the registry cannot be reached, or where others were first every time.
    """
    for _ in range(_MAX_TRIES):
        before = await registry.read(key)
        after = change(before)
        if after is None:
            return before
        if await (registry.create(key, after) if before is None else registry.replace(key, before, after)):
            return after
        await asyncio.sleep(random.uniform(0.0, _PAUSE_S))
    raise Unavailable(f"registry document {key!r} was changed by others {_MAX_TRIES} times in a row", retry_after_s=1.0, field="registry")

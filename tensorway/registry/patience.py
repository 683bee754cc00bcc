"""What must be said to the registry in the end, however long it is away."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from tensorway.errors import Unavailable
from tensorway.registry.port import Lease

_LOG = logging.getLogger(__name__)
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 3.0
T = TypeVar("T")


async def patiently(what: str, action: Callable[[], Awaitable[T]]) -> T:
    """The result of `action`, tried until the registry takes it, with pauses that grow; `what` says it in the log, once for each outage.

    Raises what `action` raises besides Unavailable.
    """
    num_failures = 0
    while True:
        try:
            result = await action()
        except Unavailable as error:
            if not num_failures:
                _LOG.warning("%s waits for the registry: %s", what, error)
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(num_failures, 10))
            num_failures += 1
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
        else:
            if num_failures:
                _LOG.info("%s: the registry is back", what)
            return result


async def released(lease: Lease) -> None:
    """Gives a lease up. Where the registry is away, it will find out by itself: an owner that stops cannot wait for that."""
    try:
        await lease.release()
    except Unavailable as error:
        _LOG.warning("a lease could not be given up and will run out: %s", error)

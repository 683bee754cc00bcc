"""How long a call may wait for the registry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from tensorway.deadline import Deadline
from tensorway.errors import DeadlineExceeded
from tensorway.transport.port import Call

_DEFAULT_TIMEOUT_S: Final = 5.0


@asynccontextmanager
async def answered_in_time(call: Call) -> AsyncIterator[None]:
    """Bounds what is asked of the registry by the call's deadline, or by some seconds where it has none. Raises DeadlineExceeded."""
    deadline = call.deadline or Deadline.after(_DEFAULT_TIMEOUT_S)
    try:
        async with asyncio.timeout(deadline.remaining_s()):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded("the deadline passed while the registry had not answered", hop="registry") from error

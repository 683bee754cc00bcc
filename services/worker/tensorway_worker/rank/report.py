"""What a rank tells its node: its state at each change, and a heartbeat in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from tensorway_worker.rank.executor import Executor
from tensorway_worker.rank.launch import STARTING, RankStatus
from tensorway_worker.rank.node_pipe import StatusPipe


class Report:
    """The rank's present state. Lives in the loop, so that a hung torch thread still shows.

    `facts` is called for every status and returns further fields of `RankStatus` by name, e.g. `memory_bytes`; it must not block.
    """

    def __init__(self, pipe: StatusPipe, executor: Executor, facts: Callable[[], Mapping[str, Any]] = dict) -> None:
        self._pipe = pipe
        self._executor = executor
        self._facts = facts
        self._state = STARTING
        self._detail = ""
        self._endpoint = ""
        self._fraction = -1.0
        self._is_consequence = False

    def change(
        self, state: str, detail: str = "", endpoint: str | None = None, *, fraction: float = -1.0, is_consequence: bool = False
    ) -> None:
        """Enters `state` and tells the node at once. `fraction` is the progress of the state, 0 to 1, or negative where unknown."""
        self._state, self._detail, self._fraction, self._is_consequence = state, detail, fraction, is_consequence
        if endpoint is not None:
            self._endpoint = endpoint
        self.tell()

    def tell(self) -> None:
        self._pipe.write(
            RankStatus(**{
                "state": self._state,
                "detail": self._detail,
                "fraction": self._fraction,
                "endpoint": self._endpoint,
                "num_steps": self._executor.num_steps,
                "step_running_s": round(self._executor.step_running_s, 3),
                "is_consequence": self._is_consequence,
                **self._facts(),
            })
        )

    async def heartbeat(self, every_s: float) -> None:
        """Tells the node every `every_s` seconds until cancelled: silence is what it takes for death."""
        while True:
            await asyncio.sleep(every_s)
            self.tell()

"""What a rank tells its node: its state at each change, and a heartbeat in between."""

from __future__ import annotations

import asyncio

from tensorway_worker.rank.executor import Executor
from tensorway_worker.rank.launch import STARTING, RankStatus
from tensorway_worker.rank.node_pipe import StatusPipe


class Report:
    """The rank's present state. Lives in the loop, so that a hung torch thread still shows."""

    def __init__(self, pipe: StatusPipe, executor: Executor) -> None:
        self._pipe = pipe
        self._executor = executor
        self._state = STARTING
        self._detail = ""
        self._endpoint = ""

    def change(self, state: str, detail: str = "", endpoint: str | None = None) -> None:
        """Enters `state` and tells the node at once."""
        self._state, self._detail = state, detail
        if endpoint is not None:
            self._endpoint = endpoint
        self.tell()

    def tell(self) -> None:
        self._pipe.write(
            RankStatus(
                state=self._state,
                detail=self._detail,
                endpoint=self._endpoint,
                num_steps=self._executor.num_steps,
                step_running_s=round(self._executor.step_running_s, 3),
            )
        )

    async def heartbeat(self, every_s: float) -> None:
        """Tells the node every `every_s` seconds until cancelled: silence is what it takes for death."""
        while True:
            await asyncio.sleep(every_s)
            self.tell()

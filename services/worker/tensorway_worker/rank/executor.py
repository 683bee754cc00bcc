"""The rank's one torch thread: everything that touches the model runs there, in order, under inference_mode."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

import torch

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

#: One piece of work; it must not raise.
Work = Callable[[], None]


class Executor:
    """Runs work in one dedicated thread.

    Counts steps, and tells how long the running one has taken: read from the loop's thread, so that a hung step shows.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, num_threads: int, on_crash: Callable[[BaseException], None]) -> None:
        self._loop = loop
        self._num_threads = num_threads
        self._on_crash = on_crash
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="torch", daemon=True)
        self.num_steps = 0
        #: Called after each step, from whatever thread.
        self.on_step: Callable[[], object] | None = None
        #: Steps that run now, by the instant of their start; a pipeline has several on their way.
        self._running: list[float] = []
        self._counting = threading.Lock()
        self._busy_s = 0.0
        self._work_began_s = 0.0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the work that is queued. Does not wait: a hung step must not keep the process alive."""
        self._queue.put(None)

    def enqueue(self, work: Work) -> None:
        """Queues `work`, from any thread. An exception that escapes it counts as a crash of the rank."""
        self._queue.put(work)

    def run(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Runs `call` in the torch thread; the future, of the loop, gets its result or exception."""
        future: asyncio.Future[T] = self._loop.create_future()

        def work() -> None:
            try:
                result = call()
            except Exception as error:  # noqa: BLE001 - handed to whoever waits for the future
                self._loop.call_soon_threadsafe(_fail, future, error)
            else:
                self._loop.call_soon_threadsafe(_resolve, future, result)

        self._queue.put(work)
        return future

    def crash(self, error: BaseException) -> None:
        """Reports, from any thread, that the rank is of no more use."""
        self._loop.call_soon_threadsafe(self._on_crash, error)

    @property
    def step_running_s(self) -> float:
        """Seconds since the longest running step began; 0 between steps."""
        running = self._running
        return time.monotonic() - min(running) if running else 0.0

    @property
    def busy_s(self) -> float:
        """Seconds that the torch thread has worked since its start."""
        began_s = self._work_began_s
        return self._busy_s + (time.monotonic() - began_s if began_s else 0.0)

    def begin_step(self) -> float:
        """Marks the start of a step, from any thread; returns the instant."""
        began_s = time.monotonic()
        with self._counting:
            self._running = [*self._running, began_s]
        return began_s

    def end_step(self, began_s: float) -> float:
        """Marks the end of the step that began at `began_s`; returns the instant."""
        with self._counting:
            self._running = [one for one in self._running if one != began_s]
            self.num_steps += 1
        on_step = self.on_step
        if on_step is not None:
            on_step()
        return time.monotonic()

    def _serve(self) -> None:
        torch.set_num_threads(max(1, self._num_threads))
        with torch.inference_mode():
            while (work := self._queue.get()) is not None:
                self._work_began_s = time.monotonic()
                try:
                    work()
                except BaseException as error:  # noqa: BLE001 - ends the rank
                    _LOG.exception("the torch thread crashed")
                    self.crash(error)
                    return
                took_s = time.monotonic() - self._work_began_s
                self._work_began_s = 0.0
                self._busy_s += took_s
                # Tensors of the last batch must not live until the next comes.
                del work


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)

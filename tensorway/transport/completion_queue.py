"""One thread that polls grpc core's completion queue for an asyncio loop.

Waking the loop is what makes grpc.aio slow: here a burst of events costs one wake-up. An event's tag runs in the polling thread and
returns what is left to do in the loop, or None; after each event the queue is drained without waiting, and all that was left to do crosses
over in a single `call_soon_threadsafe`.

The other way round, too: each batch that the loop starts gives its interpreter lock away for a moment, and its event wakes the polling
thread, which would take the lock for that one event, batch after batch. `hold` makes it wait for all that the loop starts in one turn.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any, Final

from grpc._cython import cygrpc

from tensorway.transport.callbacks import call_guarded

_LOG = logging.getLogger(__name__)

#: What a tag leaves to the loop.
Rest = Callable[[], None]
#: Runs in the polling thread with a cygrpc event.
Tag = Callable[[Any], Rest | None]

_QUEUE_SHUTDOWN: Final = cygrpc.CompletionType.queue_shutdown
#: `poll` takes an instant on the wall clock: one long past returns at once.
_AT_ONCE: Final = 0


def forget(event: Any) -> None:
    """The tag of a batch whose end nobody waits for."""


class CompletionQueuePoller:
    """Owns a completion queue and the thread that polls it. The thread ends once the queue was shut down and is empty."""

    def __init__(self, name: str) -> None:
        self.queue: Final = cygrpc.CompletionQueue()
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[None] | None = None
        self._thread: threading.Thread | None = None
        #: The loop has it while it holds the thread.
        self._gate = threading.Lock()
        self._is_held = False

    def start(self) -> None:
        """Starts polling on behalf of the running loop."""
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._thread = threading.Thread(target=self._poll, args=(self._loop,), name=self._name, daemon=True)
        self._thread.start()

    def hold(self) -> None:
        """In the loop: events are not taken before this turn of the loop is over."""
        if not self._is_held and self._loop is not None:
            self._is_held = True
            self._gate.acquire()
            self._loop.call_soon(self._let_go)

    def _let_go(self) -> None:
        self._is_held = False
        self._gate.release()

    async def stop(self) -> None:
        """Shuts the queue down and waits until what is left in it has been dealt with. Nothing may be started on it any more."""
        self.queue.shutdown()
        if self._thread is None or self._ended is None:
            return
        await self._ended
        # The thread said so with its last breath: this does not block.
        self._thread.join()
        self._thread = None

    def _poll(self, loop: asyncio.AbstractEventLoop) -> None:
        poll = self.queue.poll
        while True:
            rests: list[Rest] = []
            event = poll(None)
            with self._gate:
                pass  # what the loop is starting ends here, too
            while event.tag is not None:
                try:
                    rest = event.tag(event)
                    if rest is not None:
                        rests.append(rest)
                except Exception:  # noqa: BLE001 - one RPC's bug must not end the polling of all
                    _LOG.exception("a completion event of %s could not be handled", self._name)
                event = poll(_AT_ONCE)
            has_ended = event.completion_type == _QUEUE_SHUTDOWN
            # The last event may hold the last reference to a call, whose destruction this very queue must see through.
            del event
            try:
                if rests:
                    loop.call_soon_threadsafe(_run, rests)
                if has_ended:
                    loop.call_soon_threadsafe(self._on_ended)
            except RuntimeError:
                # The loop was closed without stopping what polls here: nobody is left to tell.
                return
            if has_ended:
                return

    def _on_ended(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)


def _run(rests: list[Rest]) -> None:
    for rest in rests:
        call_guarded("the rest of a completion event", rest)

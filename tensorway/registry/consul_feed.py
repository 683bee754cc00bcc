"""A feed: one blocking query that never ends, decoded once a change, for everybody in this process who watches the same.

As Consul's documentation of blocking queries has it: an index that goes backwards, or is none, begins anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Final, Generic, TypeVar

from tensorway.errors import TensorwayError
from tensorway.registry.consul_agents import Agents, BackOff, Outage
from tensorway.registry.consul_tasks import RegistryTasks
from tensorway.registry.held_view import HeldView

_LOG = logging.getLogger(__name__)

WAIT: Final = "30s"
#: Consul adds up to a sixteenth to the wait; what takes longer than this has no answer.
_ANSWER_S: Final = 38.0
_CATCH_UP_S: Final = 2.0
#: Removals are held back for this long after an outage: owners register again within two seconds of contact.
SETTLE_S: Final = 5.0
#: Time between two looks, per row and at least: a burst of changes among 1 000 rows must not keep the loop busy with decoding.
_REST_S: Final = 0.01
_REST_PER_ROW_S: Final = 1e-4

T = TypeVar("T")
#: Asks with (client, index, wait) and returns the new index and the rows by key.
Fetch = Callable[[Any, int | None, str | None], Awaitable[tuple[int, dict[str, T]]]]


class Feed(Generic[T]):
    """Rows by key. Runs while somebody is subscribed."""

    def __init__(self, what: str, fetch: Fetch[T], agents: Agents, tasks: RegistryTasks, settle_s: float = SETTLE_S) -> None:
        self._what = what
        self._fetch = fetch
        self._agents = agents
        self._tasks = tasks
        self._settle_s = settle_s
        self._view: HeldView[T] = HeldView(settle_s)
        self._running: asyncio.Task[None] | None = None
        self._subscribers: set[asyncio.Event] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._index: int | None = None

    @property
    def shown(self) -> Mapping[str, T] | None:
        """What subscribers see now; None where nobody is subscribed, or nothing has been read yet."""
        return self._view.shown if self._running is not None else None

    def disturb(self) -> None:
        """Removals that the next look shows are held back for a while."""
        self._view.disturb()

    async def subscribe(self) -> AsyncGenerator[Mapping[str, T], None]:
        """Yields the rows as soon as they are known, and after changes; a slow reader skips to the latest."""
        changed = asyncio.Event()
        changed.set()
        self._subscribers.add(changed)
        if self._running is None:
            self._view, self._index = HeldView(self._settle_s), None
            self._running = self._tasks.start(self._run(), f"registry feed of {self._what}")
        elif self._view.shown is not None:
            await self._catch_up()
        try:
            while True:
                await changed.wait()
                changed.clear()
                if self._view.shown is not None:
                    yield self._view.shown
        finally:
            self._subscribers.discard(changed)
            if not self._subscribers:
                self._stop()

    async def _catch_up(self) -> None:
        """Looks at once: whoever has just written something, and then subscribes to a feed that runs, is shown it."""
        try:
            index, rows = await self._agents.once(lambda client: self._fetch(client, None, None), f"reading {self._what}", _CATCH_UP_S)
        except (Outage, TensorwayError) as error:
            _LOG.debug("going on with what is known: %s", error)
            return
        if self._index is not None and index >= self._index:
            self._show(self._view.take(rows, time.monotonic()))

    async def _run(self) -> None:
        back_off = BackOff()
        while True:
            try:
                num_rows = await self._look()
            except Outage:
                self._view.disturb()
            except TensorwayError as error:
                # Nobody is there to be told, and an operator may mend it: a right that is missing, for example.
                _LOG.error("%s cannot be watched: %s", self._what, error)
                self._view.disturb()
                await asyncio.sleep(1.0)
            else:
                back_off.reset()
                await asyncio.sleep(_REST_S + _REST_PER_ROW_S * num_rows)
                continue
            self._index = None
            await back_off.wait()

    async def _look(self) -> int:
        """One query; returns the number of rows."""
        last = self._index
        index, rows = await self._agents.once(
            lambda client: self._fetch(client, last, WAIT if last else None), f"watching {self._what}", _ANSWER_S
        )
        if last is not None and index < last:
            _LOG.warning("registry: Consul's index went back from %d to %d while watching %s", last, index, self._what)
            self._view.disturb()
            self._index = None
        else:
            self._index = max(1, index)
        self._show(self._view.take(rows, time.monotonic()))
        return len(rows)

    def _show(self, has_changed: bool) -> None:
        if has_changed:
            for subscriber in self._subscribers:
                subscriber.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        settles_in_s = self._view.settles_in_s(time.monotonic())
        if settles_in_s is not None:
            self._timer = asyncio.get_running_loop().call_later(settles_in_s + 0.001, self._settle)

    def _settle(self) -> None:
        self._timer = None
        self._show(self._view.settle(time.monotonic()))

    def _stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            self._running = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Feeds:
    """All feeds of a registry, by what they watch: whoever watches the same shares one."""

    def __init__(self, agents: Agents, tasks: RegistryTasks) -> None:
        self._agents = agents
        self._tasks = tasks
        self._feeds: dict[str, Feed[Any]] = {}

    def of(self, what: str, fetch: Fetch[T], settle_s: float = SETTLE_S) -> Feed[T]:
        """The feed named `what`; `fetch` is how to begin it."""
        if what not in self._feeds:
            self._feeds[what] = Feed(what, fetch, self._agents, self._tasks, settle_s)
        return self._feeds[what]

    def disturb(self) -> None:
        """What Consul says next may be less than there is."""
        for feed in self._feeds.values():
            feed.disturb()

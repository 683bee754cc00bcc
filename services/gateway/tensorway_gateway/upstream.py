"""The way on: one link to every registered orchestrator, and the choice among them for each request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from tensorway.deadline import Deadline
from tensorway.errors import DeadlineExceeded, TensorwayError, Unavailable
from tensorway.registry.port import ORCHESTRATOR, Registration, Registry
from tensorway.tls import MeshTls
from tensorway.transport import create_link_client
from tensorway.transport.port import LinkClient, Payload, Reply
from tensorway_gateway.choice import choose, order

_LOG = logging.getLogger(__name__)
NO_ORCHESTRATOR: Final = "no orchestrator is connected to this gateway"


@dataclass(slots=True, eq=False)
class Orchestrator:
    """One registered orchestrator and its link."""

    id: str
    link: LinkClient
    num_in_flight: int = 0
    #: Requests and streams that it was sent since it was found.
    num_sent: int = 0
    is_leaving: bool = False
    has_idled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def can_take(self) -> bool:
        return not self.is_leaving and self.link.is_connected

    def begin(self) -> None:
        self.num_in_flight += 1
        self.num_sent += 1
        self.has_idled.clear()

    def end(self) -> None:
        self.num_in_flight -= 1
        if not self.num_in_flight:
            self.has_idled.set()


class Attempt:
    """The sink of one sending: a future, and whether the peer still owes an answer."""

    __slots__ = ("is_answered", "outcome")

    def __init__(self, outcome: asyncio.Future[Reply]) -> None:
        self.outcome = outcome
        self.is_answered = False

    def on_reply(self, head: bytes, payload: Payload) -> None:
        self.is_answered = True
        if not self.outcome.done():
            self.outcome.set_result(Reply(head, payload))

    def on_error(self, error: TensorwayError) -> None:
        self.is_answered = True
        if not self.outcome.done():
            self.outcome.set_exception(error)

    def expire(self, orchestrator: str) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(
                DeadlineExceeded(f"the deadline passed while orchestrator {orchestrator} had not answered", hop="orchestrator")
            )


class Upstream:
    """All orchestrators. `on_change` is called in the loop when one connects, breaks, comes or goes."""

    def __init__(
        self, registry: Registry, max_message_bytes: int, wait_s: float, on_change: Callable[[], None], local_links: bool = True,
        tls: MeshTls | None = None,
    ) -> None:
        self._tls = None if tls is None else tls.dial(ORCHESTRATOR)
        self._registry = registry
        self._max_message_bytes = max_message_bytes
        self._wait_s = wait_s
        self._on_change = on_change
        self._local_links = local_links
        self._orchestrators: dict[str, Orchestrator] = {}
        self._stops: dict[str, asyncio.Event] = {}
        #: Model -> preference; forgotten whenever the orchestrators change.
        self._preferred: dict[str, tuple[str, ...]] = {}
        self._connected = asyncio.Event()
        #: Requests that went to another orchestrator because the one before was lost or refused.
        self.num_reroutes = 0

    def orchestrators(self) -> tuple[Orchestrator, ...]:
        """All that are registered, connected or not; ids are `ID@ENDPOINT`."""
        return tuple(self._orchestrators.values())

    @property
    def has_connected(self) -> bool:
        """Whether a request could be sent now."""
        return any(orchestrator.can_take for orchestrator in self._orchestrators.values())

    async def send(self, model: str, head: bytes, payload: Payload, deadline: Deadline, *, is_keyed: bool = False) -> Reply:
        """Sends one request and waits for its answer; where an orchestrator is lost or refuses before it answers, tries the next. One with
        an idempotency key goes to the orchestrator that the model prefers, however busy: only there is the key known.

        Raises the orchestrator's error, Unavailable where none answers, or DeadlineExceeded. Cancels at the orchestrator when cancelled.
        """
        tried: set[str] = set()
        lost: Unavailable | None = None
        while True:
            orchestrator = await self.pick(model, tried, lost, deadline, is_keyed=is_keyed)
            tried.add(orchestrator.id)
            try:
                return await self._attempt(orchestrator, head, payload, deadline)
            except Unavailable as error:
                _LOG.debug("orchestrator %s did not answer: %s", orchestrator.id, error)
                lost = error

    async def pick(
        self, model: str, tried: set[str], lost: Unavailable | None, deadline: Deadline, *, is_keyed: bool = False
    ) -> Orchestrator:
        """The orchestrator that a request of `model` should go to, none of `tried`; waits while none is connected.

        Raises `lost`, the last refusal, where all that are connected were tried; Unavailable after the configured wait; DeadlineExceeded.
        """
        while True:
            orchestrator = self._choose(model, tried, is_keyed)
            if orchestrator is not None:
                self.num_reroutes += lost is not None
                return orchestrator
            if lost is not None and self.has_connected:
                raise lost
            await self.wait_connected(deadline, lost)

    async def all_connected(self, deadline: Deadline) -> tuple[Orchestrator, ...]:
        """Every orchestrator that can take requests; waits for one like `pick`."""
        while True:
            found = tuple(orchestrator for orchestrator in self._orchestrators.values() if orchestrator.can_take)
            if found:
                return found
            await self.wait_connected(deadline, None)

    async def run(self) -> None:
        """Follows the registry until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            async for registrations in self._registry.watch(ORCHESTRATOR):
                live = {f"{registration.id}@{registration.endpoint}": registration for registration in registrations}
                for gone in self._stops.keys() - live.keys():
                    self._stops.pop(gone).set()
                for new in live.keys() - self._stops.keys():
                    self._stops[new] = stop = asyncio.Event()
                    tasks.create_task(self._keep(new, live[new], stop), name=f"orchestrator {new}")

    def _choose(self, model: str, tried: set[str], is_keyed: bool) -> Orchestrator | None:
        orchestrators = self._orchestrators
        if len(orchestrators) == 1 and not tried:
            (only,) = orchestrators.values()
            return only if only.can_take else None
        preferred = self._preferred.get(model)
        if preferred is None:
            preferred = self._preferred[model] = order(model, orchestrators)
        in_flight = {
            name: orchestrator.num_in_flight for name, orchestrator in orchestrators.items() if name not in tried and orchestrator.can_take
        }
        chosen = choose(preferred, dict.fromkeys(in_flight, 0) if is_keyed else in_flight)
        return None if chosen is None else orchestrators[chosen]

    async def _attempt(self, orchestrator: Orchestrator, head: bytes, payload: Payload, deadline: Deadline) -> Reply:
        loop = asyncio.get_running_loop()
        attempt = Attempt(loop.create_future())
        request_id = orchestrator.link.send(head, payload, deadline, attempt)
        timer = loop.call_later(max(0.0, deadline.remaining_s()), attempt.expire, orchestrator.id)
        orchestrator.begin()
        try:
            return await attempt.outcome
        finally:
            timer.cancel()
            orchestrator.end()
            if not attempt.is_answered:
                orchestrator.link.cancel(request_id)

    async def wait_connected(self, deadline: Deadline, lost: Unavailable | None) -> None:
        """Returns once one can take requests; raises Unavailable after the configured wait, or DeadlineExceeded."""
        remaining_s = deadline.remaining_s()
        self._connected.clear()
        try:
            async with asyncio.timeout(min(self._wait_s, remaining_s)):
                await self._connected.wait()
        except TimeoutError:
            if remaining_s <= self._wait_s:
                raise DeadlineExceeded(f"the deadline passed while {NO_ORCHESTRATOR}", hop="gateway") from lost
            raise Unavailable(f"{NO_ORCHESTRATOR}; waited {self._wait_s:g} s for one", retry_after_s=1.0) from lost

    async def _keep(self, name: str, registration: Registration, stop: asyncio.Event) -> None:
        """One orchestrator from its registration to its end. A draining one first answers what it was sent."""
        link = create_link_client(
            registration.endpoint, self._max_message_bytes, self._changed, may_be_local=self._local_links, tls=self._tls
        )
        orchestrator = Orchestrator(name, link)
        orchestrator.has_idled.set()
        self._orchestrators[name] = orchestrator
        self._preferred.clear()
        try:
            async with asyncio.TaskGroup() as own:
                running = own.create_task(link.run(), name=f"link {name}")
                await stop.wait()
                orchestrator.is_leaving = True
                self._changed()
                await orchestrator.has_idled.wait()
                running.cancel()
        finally:
            orchestrator.is_leaving = True
            del self._orchestrators[name]
            self._preferred.clear()
            self._changed()

    def _changed(self) -> None:
        """A link connected or broke, or an orchestrator came or went."""
        if self.has_connected:
            self._connected.set()
        self._on_change()

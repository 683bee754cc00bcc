"""The registrations that this process owns, as services of a Consul agent: made, kept, made again, taken away."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from tensorway.deadline import Deadline
from tensorway.errors import FailedPrecondition, TensorwayError
from tensorway.registry import consul_rows as rows
from tensorway.registry.consul_agents import OPERATION_S, Agents, BackOff, Outage
from tensorway.registry.consul_rows import Row
from tensorway.registry.consul_services import PING_S, Services
from tensorway.registry.consul_tasks import RegistryTasks
from tensorway.registry.consul_url import Address, ConsulUrl
from tensorway.registry.port import Registration

_LOG = logging.getLogger(__name__)

#: A dead owner is found out within this: its check fails at the latest after interval and timeout together, or its TTL has passed.
_DEAD_BY_S: Final = 6.0
_RELEASE_S: Final = 3.0


@dataclass(eq=False)
class MemberLease:
    """Implements `tensorway.registry.port.Lease` for a registration."""

    _members: Members
    registration: Registration
    service: str
    has_ttl: bool
    #: The agent, and the token, with which it was made last; -1: it has to be made again.
    generation: int = -1
    token_number: int = 0
    since_ms: int = 0
    is_released: bool = False
    #: Another live process has its id.
    is_taken: bool = False
    #: What Consul says against its liveness, as far as it was logged.
    complaint: str | None = None
    #: Every agent that was told of it, and not yet told otherwise.
    places: set[Address] = field(default_factory=set)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def update(self, registration: Registration) -> None:
        if (registration.kind, registration.id) != (self.registration.kind, self.registration.id):
            raise FailedPrecondition(f"an update may not turn {self.registration.id!r} into {registration.id!r}", field="id")
        await self._members.update(self, registration)

    async def release(self) -> None:
        await self._members.release(self)

    async def wait_lost(self) -> None:
        await asyncio.Event().wait()  # what vanishes is made again


class Members:
    """The registrations owned through one registry object. `before_release` is awaited before a service (and its check) goes away."""

    def __init__(self, url: ConsulUrl, agents: Agents, tasks: RegistryTasks) -> None:
        self._url = url
        self._agents = agents
        self._tasks = tasks
        self._services = Services(url, agents)
        self._owner = secrets.token_hex(8)
        self._leases: dict[str, MemberLease] = {}
        self._clearing: asyncio.Task[None] | None = None
        self.before_release: Callable[[], Awaitable[None]] | None = None

    def checks(self) -> tuple[str, ...]:
        """IDs of the checks by which the agent in use knows that this process lives."""
        return tuple(sorted(
            rows.liveness_check_id(lease.service) for lease in self._leases.values()
            if lease.generation == self._agents.generation and not lease.is_released
        ))

    async def register(self, registration: Registration) -> MemberLease:
        """See `Registry.register`."""
        service = rows.service_id(self._url.prefix, registration.kind, registration.id)
        has_ttl = self._url.check == "ttl" or not rows.has_grpc_endpoint(registration.endpoint)
        lease = MemberLease(self, registration, service, has_ttl)
        self._payload(lease)  # what Consul would refuse is refused before anything is done
        what = f"registering {registration.kind} {registration.id!r}"
        deadline = Deadline.after(OPERATION_S + _DEAD_BY_S)
        await self._wait_free(registration, what, deadline, _DEAD_BY_S)
        async with self._services.door(registration, self._owner, what, deadline):
            await self._wait_free(registration, what, deadline, 0.0)
            await self._bury(service, what, deadline)
            try:
                await self._put_visibly(lease, what, deadline)
            except BaseException:
                lease.is_released = True
                await self._deregister(lease, Deadline.after(PING_S))
                raise
            self._leases[service] = lease
        return lease

    async def update(self, lease: MemberLease, registration: Registration) -> None:
        """Replaces what is registered. Raises Unavailable where Consul is away; it is replaced nevertheless, once Consul is back."""
        before, lease.registration = lease.registration, registration
        try:
            self._payload(lease)
        except FailedPrecondition:
            lease.registration = before
            raise
        async with lease.lock:
            lease.generation = -1
            await self._put_visibly(lease, f"updating {registration.kind} {registration.id!r}", Deadline.after(OPERATION_S))

    async def release(self, lease: MemberLease) -> None:
        """Takes the registration away; where Consul is away, its check does so, as the process ends."""
        if lease.is_released:
            return
        lease.is_released = True
        if self.before_release is not None:
            await self.before_release()
        async with lease.lock:
            self._leases.pop(lease.service, None)
            await self._deregister(lease, Deadline.after(_RELEASE_S))

    async def release_all(self) -> None:
        async with asyncio.TaskGroup() as releasing:
            for lease in tuple(self._leases.values()):
                releasing.create_task(self.release(lease))

    def doubt(self) -> None:
        """All registrations are to be made again: Consul has lost what it knew."""
        for lease in self._leases.values():
            lease.generation = -1

    async def look(self) -> None:
        """One look at the agent and at every registration there: what has vanished is made again. Raises Outage."""
        leases = tuple(self._leases.values())
        if not leases:
            await self._services.look(f"{self._url.prefix}-none")
        for lease in leases:
            async with lease.lock:
                if not lease.is_released:
                    await self._keep(lease)

    async def _keep(self, lease: MemberLease) -> None:
        agents = self._agents
        is_known = not lease.has_ttl or await self._services.report(lease.service)
        seen = await self._services.look(lease.service)
        there = rows.read_service(seen["Service"]) if seen.get("Service") else None
        self._note_liveness(lease, rows.liveness_output(seen.get("Checks"), lease.service) if there else None)
        is_mine = there is not None and there.owner == self._owner and there.since_ms == lease.since_ms
        if is_known and is_mine and (lease.generation, lease.token_number) == (agents.generation, agents.token_number):
            return
        if not await self._is_taken(lease):
            _LOG.info("registering %s %r again, at %s", lease.registration.kind, lease.registration.id, agents.address)
            await agents.once(lambda client: self._put(client, lease), "registering again", PING_S, needs_leader=False)

    def _note_liveness(self, lease: MemberLease, complaint: str | None) -> None:
        """A process that is taken for dead had better say so: its agent cannot reach it."""
        if complaint != lease.complaint:
            lease.complaint = complaint
            if complaint:
                _LOG.warning(
                    "Consul's agent at %s takes %s %r for dead: its check of %s says: %s", self._agents.address, lease.registration.kind,
                    lease.registration.id, lease.registration.endpoint, complaint.strip(),
                )

    async def _is_taken(self, lease: MemberLease) -> bool:
        """Whether another live process has taken the id since (this one was stopped, or cut off, and taken for dead)."""
        try:
            _, row = await self._agents.once(lambda client: self._services.row(client, lease.registration), "looking for a rival", PING_S)
        except Outage:
            return False  # registering needs the agent alone
        is_taken = row is not None and row.owner != self._owner and row.since_ms > lease.since_ms
        if is_taken and not lease.is_taken:
            _LOG.error(
                "%s %r was taken by another process while this one was away; it registers again when that one has gone",
                lease.registration.kind, lease.registration.id,
            )
        lease.is_taken = is_taken
        return is_taken

    async def _put_visibly(self, lease: MemberLease, what: str, deadline: Deadline) -> None:
        """Registers, and waits until everybody can see it."""

        def is_seen(row: Row | None) -> bool:
            return row is not None and row.owner == self._owner and row.since_ms >= lease.since_ms

        await self._agents.ask(lambda client: self._put(client, lease), what, deadline)
        await self._services.wait_row(lease.registration, is_seen, deadline)

    async def _put(self, client: Any, lease: MemberLease) -> None:
        agents = self._agents
        generation, token_number, address = agents.generation, agents.token_number, agents.address
        # Greater with every call, whatever the clock does: the latest row of an id is the one that counts.
        lease.since_ms = max(lease.since_ms + 1, int(time.time() * 1000))
        lease.places.add(address)
        await self._services.put(client, self._payload(lease))
        lease.generation, lease.token_number = generation, token_number
        if len(lease.places) > 1 and self._clearing is None and not self._tasks.has_closed:
            self._clearing = self._tasks.start(self._clear(), "registry: registrations left behind")

    def _payload(self, lease: MemberLease) -> dict[str, Any]:
        return rows.service_payload(self._url.prefix, lease.registration, self._owner, lease.since_ms, lease.has_ttl)

    async def _wait_free(self, registration: Registration, what: str, deadline: Deadline, dead_by_s: float) -> None:
        """Returns once no live process has the id: at once, or when the check of a dead one has failed. Raises FailedPrecondition."""
        index: int | None = None
        dead_by = Deadline.after(dead_by_s)
        while True:
            index, row = await self._agents.ask(partial(self._services.row, registration=registration, index=index), what, deadline)
            if row is None:
                return
            if row.owner == self._owner or dead_by.has_expired():
                raise FailedPrecondition(
                    f"{registration.kind} {registration.id!r} is already registered by a live process at {row.registration.endpoint}",
                    field="id",
                )

    async def _bury(self, service: str, what: str, deadline: Deadline) -> None:
        """Takes a dead owner's row from the agent: its failed check would otherwise pass on its status to ours."""
        seen = await self._agents.ask(lambda _: self._services.look(service), what, deadline)
        if seen.get("Service"):
            await self._agents.ask(lambda client: client.agent.service.deregister(service), what, deadline)

    async def _deregister(self, lease: MemberLease, deadline: Deadline) -> None:
        try:
            await self._agents.ask(
                lambda client: client.agent.service.deregister(lease.service), f"releasing {lease.registration.id!r}", deadline
            )
            lease.places.discard(self._agents.address)
            await self._services.wait_row(lease.registration, lambda row: row is None or row.owner != self._owner, deadline)
        except TensorwayError as error:
            _LOG.warning("%s; its health check ends the registration", error)
        await self._leave_places(lease)

    async def _clear(self) -> None:
        """Takes away what was left at other agents, as soon as these answer."""
        back_off = BackOff()
        while any(lease.places - {self._agents.address} for lease in self._leases.values()):
            for lease in tuple(self._leases.values()):
                await self._leave_places(lease)
            await back_off.wait()
        self._clearing = None

    async def _leave_places(self, lease: MemberLease) -> None:
        for address in lease.places - {self._agents.address}:
            if await self._services.deregister_at(address, lease.service) and (lease.is_released or address != self._agents.address):
                lease.places.discard(address)

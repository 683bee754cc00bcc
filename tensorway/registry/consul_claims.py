"""Claims: KV keys held by a session of this process.

The session hangs on the liveness check of this process's registration where there is one, so a killed owner loses its claims when its check
fails, about a second later; and on a TTL in any case. Its behaviour is `delete`: a claim that nobody holds leaves nothing behind. The lock
delay is zero: it would make everybody wait, the owner that wants its claim back included, to protect a resource that an old owner may still
be writing to; a replica is no such resource (two nodes that run one for a moment do no harm).
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from consul.callback import CB  # type: ignore[import-untyped]
from consul.exceptions import ConsulException, NotFound  # type: ignore[import-untyped]

from tensorway.deadline import Deadline
from tensorway.errors import TensorwayError
from tensorway.registry import consul_rows as rows
from tensorway.registry.consul_agents import OPERATION_S, Agents, Outage
from tensorway.registry.port import Registration

_LOG = logging.getLogger(__name__)

#: The least that Consul allows; it ends a session after one to two of these.
_TTL_S: Final = 10
_RENEW_S: Final = 3.0
_TRY_S: Final = 4.0
_RELEASE_S: Final = 3.0
#: Operations of one transaction (Consul allows 64): two a claim.
_CLAIMS_PER_TRANSACTION: Final = 32


@dataclass(eq=False)
class ClaimLease:
    """Implements `tensorway.registry.port.Lease` for a claim."""

    _claims: Claims
    key: str
    holder: str
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    async def update(self, registration: Registration) -> None:
        """Nothing to update."""

    async def release(self) -> None:
        await self._claims.release(self)

    async def wait_lost(self) -> None:
        await self.lost.wait()


@dataclass(frozen=True, slots=True)
class _Session:
    id: str
    generation: int
    checks: tuple[str, ...]


class Claims:
    """The claims taken through one registry object. `checks` says by what this process is known to live."""

    def __init__(self, prefix: str, agents: Agents, checks: Callable[[], tuple[str, ...]]) -> None:
        self._folder = f"{prefix}/claims/"
        self._name = f"{prefix} claims"
        self._agents = agents
        self._checks = checks
        self._session: _Session | None = None
        self._leases: dict[str, ClaimLease] = {}
        #: Released while Consul was away: to be deleted, lest the session hold them for ever.
        self._unreleased: dict[str, ClaimLease] = {}
        self._lock = asyncio.Lock()
        self._renew_at = Deadline.after(0.0)
        #: The session may have ended; single claims may have been taken from it.
        self._must_renew = False
        self._must_retake = False

    async def claim(self, key: str, holder: str) -> ClaimLease | None:
        """See `Registry.claim`."""
        rows.check_size(key, holder.encode())
        what, deadline = f"claiming {key!r}", Deadline.after(OPERATION_S)
        async with self._lock:
            if key in self._leases:
                return None
            lease = ClaimLease(self, key, holder)

            async def take(client: Any) -> bool:
                session = await self._live_session(client)
                # With a session that has just ended Consul answers an error: the next try renews first, and has another.
                self._must_renew = True
                taken: bool = await self._take(client, lease, session)
                self._must_renew = False
                return taken

            if not await self._agents.ask(take, what, deadline):
                return None
            self._unreleased.pop(key, None)
            self._leases[key] = lease
            return lease

    async def release(self, lease: ClaimLease) -> None:
        """Gives a claim up; done later where Consul is away."""
        if self._leases.get(lease.key) is not lease:
            return
        async with self._lock:
            self._leases.pop(lease.key, None)
            if lease.lost.is_set():
                return
            self._unreleased[lease.key] = lease
            try:
                await self._agents.ask(lambda client: self._drop(client, lease), f"releasing {lease.key!r}", Deadline.after(_RELEASE_S))
            except TensorwayError as error:
                _LOG.warning("%s; it is given up as soon as Consul is back", error)

    async def release_all(self) -> None:
        """Gives up everything, the session included."""
        async with self._lock:
            self._leases.clear()
            session, self._session = self._session, None
            if session is not None:
                try:
                    await self._agents.ask(
                        lambda client: client.session.destroy(session.id), "releasing all claims", Deadline.after(_RELEASE_S)
                    )
                except TensorwayError as error:
                    _LOG.warning("%s; the session's TTL ends them", error)

    def doubt(self) -> None:
        """Look at the next opportunity whether everything is still held."""
        self._must_renew = self._must_retake = True

    def differs(self, seen: Mapping[str, tuple[str, str]]) -> bool:
        """Whether a view of all claims, {key: (holder, session)}, shows one of ours with another session or none."""
        session = self._session.id if self._session else ""
        return any(seen.get(key, ("", ""))[1] != session for key in self._leases)

    async def look(self) -> None:
        """Renews the session in time, has it hang on the checks that there are, and takes back what was lost. Raises Outage."""
        if not self._leases and not self._unreleased:
            return
        async with self._lock:
            await self._agents.once(self._tend, "keeping claims", _TRY_S)

    async def detach(self) -> None:
        """The checks of this process end soon: its claims must not end with them."""
        async with self._lock:
            if self._session is not None and self._session.checks:
                try:
                    await self._agents.once(self._replace_session, "keeping claims", _TRY_S)
                except (Outage, TensorwayError) as error:
                    _LOG.warning("claims end with the registration: %s", error)

    async def _tend(self, client: Any) -> None:
        for lease in tuple(self._unreleased.values()):
            await self._drop(client, lease)
        session = await self._live_session(client)
        if not self._must_retake:
            return
        self._must_retake = False
        for lease in tuple(self._leases.values()):
            try:
                is_held = await self._take(client, lease, session)
            except BaseException:
                self._must_renew = self._must_retake = True
                raise
            if not is_held:
                _LOG.warning("claim %r is lost: another took it while it was not held", lease.key)
                del self._leases[lease.key]
                lease.lost.set()

    async def _live_session(self, client: Any) -> _Session:
        """The session, renewed where it is time; a new one where it has ended, or hangs on other checks than there are."""
        session = self._session
        if session is not None and (self._must_renew or self._renew_at.has_expired()):
            try:
                await client.session.renew(session.id)
                self._renew_at = Deadline.after(_RENEW_S)
                self._must_renew = False
            except NotFound:
                _LOG.info("the session of this process's claims has ended")
                self._session = session = None
        if session is None or session.generation != self._agents.generation or set(session.checks) != set(self._checks()):
            session = await self._replace_session(client)
        return session

    async def _replace_session(self, client: Any) -> _Session:
        """A new session; what the old one holds goes over to it without a moment in which nobody holds it."""
        old, generation, checks = self._session, self._agents.generation, self._checks()
        try:
            id_ = await self._create(client, checks)
        except ConsulException as error:
            # A check that has only just been made, or fails for a moment, cannot carry a session yet.
            _LOG.debug("no session with %s yet: %s", checks, error)
            if old is not None and old.generation == generation and not old.checks:
                return old
            id_, checks = await self._create(client, ()), ()
        session = _Session(id_, generation, checks)
        if old is None:
            self._must_retake = True
        else:
            keys = list(self._leases)
            for start in range(0, len(keys), _CLAIMS_PER_TRANSACTION):
                await self._hand_over(client, keys[start:start + _CLAIMS_PER_TRANSACTION], old, session)
            await client.session.destroy(old.id)
        self._session, self._renew_at, self._must_renew = session, Deadline.after(_RENEW_S), False
        return session

    async def _create(self, client: Any, checks: tuple[str, ...]) -> str:
        id_: str = await client.session.create(
            name=self._name, checks=["serfHealth", *checks], lock_delay=0, behavior="delete", ttl=_TTL_S
        )
        return id_

    async def _hand_over(self, client: Any, keys: list[str], old: _Session, new: _Session) -> None:
        steps = []
        for key in keys:
            value = base64.b64encode(self._leases[key].holder.encode()).decode()
            place = {"Key": self._folder + rows.quote_key(key), "Value": value}
            steps += [{"KV": {"Verb": "unlock", "Session": old.id, **place}}, {"KV": {"Verb": "lock", "Session": new.id, **place}}]
        if not await self._transact(client, steps):
            self._must_retake = True  # one of them was no longer held: `_tend` takes them one by one

    async def _take(self, client: Any, lease: ClaimLease, session: _Session) -> bool:
        taken: bool = await client.kv.put(self._folder + rows.quote_key(lease.key), lease.holder, acquire=session.id)
        return taken

    async def _drop(self, client: Any, lease: ClaimLease) -> None:
        """Deletes the key if it is still ours."""
        key = self._folder + rows.quote_key(lease.key)
        if self._session is not None:
            await self._transact(
                client, [{"KV": {"Verb": "check-session", "Key": key, "Session": self._session.id}}, {"KV": {"Verb": "delete", "Key": key}}]
            )
        self._unreleased.pop(lease.key, None)

    async def _transact(self, client: Any, steps: list[dict[str, Any]]) -> bool:
        """All steps or none; says which."""

        def read(response: Any) -> bool:
            return bool(response.code != 409 and CB.boolean()(response))

        done: bool = await client.http.put(read, "/v1/txn", params=_dc(client), headers=client.prepare_headers(), data=json.dumps(steps))
        return done


def _dc(client: Any) -> list[tuple[str, str]]:
    return [("dc", client.dc)] if client.dc else []

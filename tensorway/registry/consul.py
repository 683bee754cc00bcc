"""The Consul adapter: a registry for many machines. See docs/registry.md for what it needs and what it promises.

One task looks after what this process owns, every second: registrations, claims, documents. Watches share one blocking query for whatever
they watch alike. All of it begins with the first use and ends with `close`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any, Final, Self, TypeVar

from tensorway.deadline import Deadline
from tensorway.errors import TensorwayError
from tensorway.registry import consul_rows as rows
from tensorway.registry.consul_agents import OPERATION_S, Agents, Outage
from tensorway.registry.consul_claims import Claims
from tensorway.registry.consul_documents import Documents
from tensorway.registry.consul_entries import EntryReader
from tensorway.registry.consul_feed import Feed, Feeds
from tensorway.registry.consul_members import Members
from tensorway.registry.consul_services import read_service
from tensorway.registry.consul_tasks import RegistryTasks
from tensorway.registry.consul_url import parse_consul_url
from tensorway.registry.port import Lease, Registration

_LOG = logging.getLogger(__name__)
_LOOK_S: Final = 1.0

T = TypeVar("T")
U = TypeVar("U")


class ConsulRegistry:
    """Implements `tensorway.registry.port.Registry` on Consul."""

    def __init__(self, url: str) -> None:
        """Opens nothing yet. Raises InvalidRequest for a URL that is none (see `consul_url`)."""
        parsed = parse_consul_url(url)
        self._prefix = parsed.prefix
        self._tasks = RegistryTasks()
        self._agents = Agents(parsed)
        self._feeds = Feeds(self._agents, self._tasks)
        self._members = Members(parsed, self._agents, self._tasks)
        self._claims = Claims(parsed.prefix, self._agents, self._members.checks)
        self._documents = Documents(parsed.prefix, self._agents, self._feeds, self._tasks, self._on_reset)
        self._members.before_release = self._claims.detach
        self._agents.on_doubt = self._on_doubt
        self._readers: dict[str, EntryReader] = {}
        self._wake = asyncio.Event()
        self._is_kept = False
        self._follows_claims = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def register(self, registration: Registration) -> Lease:
        self._keep()
        await self._documents.establish()
        lease = await self._members.register(registration)
        self._wake.set()  # claims that were taken before hang on its liveness from now on
        return lease

    async def registrations(self, kind: str) -> tuple[Registration, ...]:
        feed = self._member_feed(kind)
        if self._agents.is_away and feed.shown is not None:
            return _by_id(feed.shown)  # going on with what is known

        async def fetch(client: Any) -> dict[str, Registration]:
            return (await self._fetch_members(kind, client, None, None))[1]

        return _by_id(await self._agents.ask(fetch, f"reading the {kind}s"))

    async def watch(self, kind: str) -> AsyncIterator[tuple[Registration, ...]]:
        async with aclosing(self._changes(self._member_feed(kind), _by_id)) as changes:
            async for registrations in changes:
                yield registrations

    async def read(self, key: str) -> bytes | None:
        return await self._documents.read(key)

    async def write(self, key: str, value: bytes) -> None:
        deadline = await self._prepare_to_write()
        await self._documents.write(key, value, deadline)

    async def create(self, key: str, value: bytes) -> bool:
        deadline = await self._prepare_to_write()
        return await self._documents.create(key, value, deadline)

    async def replace(self, key: str, before: bytes, value: bytes) -> bool:
        deadline = await self._prepare_to_write()
        return await self._documents.replace(key, before, value, deadline)

    async def delete(self, key: str) -> None:
        await self._documents.delete(key)

    async def watch_documents(self, prefix: str) -> AsyncIterator[Mapping[str, bytes]]:
        def select(seen: Mapping[str, bytes]) -> dict[str, bytes]:
            return {key: value for key, value in seen.items() if key.startswith(prefix)}

        async with aclosing(self._changes(self._documents.feed(prefix), select)) as changes:
            async for documents in changes:
                yield documents

    async def claim(self, key: str, holder: str) -> Lease | None:
        self._keep()
        if not self._follows_claims and not self._tasks.has_closed:
            self._follows_claims = True
            self._tasks.start(self._follow_claims(), "registry: own claims")
        return await self._claims.claim(key, holder)

    async def watch_claims(self, prefix: str) -> AsyncIterator[Mapping[str, str]]:
        def select(seen: Mapping[str, tuple[str, str]]) -> dict[str, str]:
            return {key: holder for key, (holder, _) in seen.items() if key.startswith(prefix)}

        async with aclosing(self._changes(self._claim_feed(), select)) as changes:
            async for claims in changes:
                yield claims

    async def close(self) -> None:
        """Releases every lease and ends every task; where Consul is away, within a few seconds."""
        await self._tasks.close()
        async with asyncio.TaskGroup() as releasing:
            releasing.create_task(self._claims.release_all())
            releasing.create_task(self._members.release_all())
        await self._agents.close()

    async def _prepare_to_write(self) -> Deadline:
        self._keep()
        deadline = Deadline.after(OPERATION_S)
        await self._documents.establish(deadline)
        return deadline

    async def _changes(self, feed: Feed[T], select: Callable[[Mapping[str, T]], U]) -> AsyncGenerator[U, None]:
        """What `select` makes of the feed, at once and whenever it becomes something else."""
        self._keep()
        last: U | None = None
        async with aclosing(feed.subscribe()) as seen:
            async for shown in seen:
                selected = select(shown)
                if selected != last:
                    last = selected
                    yield selected

    def _member_feed(self, kind: str) -> Feed[Registration]:
        async def fetch(client: Any, index: int | None, wait: str | None) -> tuple[int, dict[str, Registration]]:
            return await self._fetch_members(kind, client, index, wait)

        return self._feeds.of(f"registrations of {kind}s", fetch)

    async def _fetch_members(self, kind: str, client: Any, index: int | None, wait: str | None) -> tuple[int, dict[str, Registration]]:
        reader = self._readers.setdefault(kind, EntryReader())
        found, live = await read_service(client, rows.service_name(self._prefix, kind), reader, index, wait)
        return found, {id_: row.registration for id_, row in rows.live_rows(live).items()}

    def _claim_feed(self) -> Feed[tuple[str, str]]:
        folder = f"{self._prefix}/claims/"

        async def fetch(client: Any, index: int | None, wait: str | None) -> tuple[int, dict[str, tuple[str, str]]]:
            found, entries = await client.kv.get(folder, index=index, wait=wait, recurse=True)
            return int(found), {
                rows.unquote_key(entry["Key"][len(folder):]): ((entry["Value"] or b"").decode(), entry["Session"])
                for entry in entries or () if entry.get("Session")
            }

        return self._feeds.of("claims", fetch)

    async def _follow_claims(self) -> None:
        """Looks at once when somebody else, or nobody, holds a claim of ours."""
        async for seen in self._claim_feed().subscribe():
            if self._claims.differs(seen):
                self._claims.doubt()
                self._wake.set()

    def _keep(self) -> None:
        if not self._is_kept and not self._tasks.has_closed:
            self._is_kept = True
            self._tasks.start(self._look_after(), "registry: what this process owns")

    async def _look_after(self) -> None:
        """Every second, and when woken: the agent, and everything that this process owns."""
        while True:
            for look in (self._agents.look_at_token, self._members.look, self._claims.look, self._documents.look):
                try:
                    await look()
                except Outage as error:
                    _LOG.debug("registry: %s", error)
                except TensorwayError as error:
                    _LOG.error("%s", error)
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self._wake.wait()
            except TimeoutError:
                continue
            self._wake.clear()

    def _on_doubt(self) -> None:
        """The agent is lost, or was: what it says next may be less than there is."""
        self._feeds.disturb()
        self._claims.doubt()

    def _on_reset(self) -> None:
        self._on_doubt()
        self._members.doubt()
        self._wake.set()


def _by_id(found: Mapping[str, Registration]) -> tuple[Registration, ...]:
    return tuple(found[id_] for id_ in sorted(found))

"""Documents: KV values that outlive their writers, and, where Consul loses its data, are restored by them.

A random name in `PREFIX/mesh` tells such a loss: absent, or another one, means that Consul has begun anew. Only then does a process write
again what it wrote last and nobody has changed or deleted since (it watches the folders of its documents), and only where nothing is there.
So what an operator deletes stays deleted.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from tensorway.deadline import Deadline
from tensorway.registry import consul_rows as rows
from tensorway.registry.consul_agents import Agents, Outage
from tensorway.registry.consul_feed import Feed, Feeds
from tensorway.registry.consul_tasks import RegistryTasks

_LOG = logging.getLogger(__name__)
_TRY_S: Final = 5.0


@dataclass(slots=True)
class _Written:
    """A document of ours. Until the feed has shown it, what the feed shows is older than it."""

    value: bytes
    was_seen: bool = False


class Documents:
    """The documents of one registry object. `on_reset` is called when Consul has lost its data."""

    def __init__(self, prefix: str, agents: Agents, feeds: Feeds, tasks: RegistryTasks, on_reset: Callable[[], None]) -> None:
        self._prefix = prefix
        self._folder = f"{prefix}/documents/"
        self._mesh_key = f"{prefix}/mesh"
        self._agents = agents
        self._feeds = feeds
        self._tasks = tasks
        self._on_reset = on_reset
        self._mesh: str | None = None
        self._is_following = False
        self._written: dict[str, _Written] = {}
        self._followed: set[str] = set()
        self._must_restore = False

    async def read(self, key: str) -> bytes | None:
        _, found = await self._agents.ask(lambda client: client.kv.get(self._key(key)), f"reading {key!r}")
        return None if found is None else bytes(found["Value"] or b"")

    async def write(self, key: str, value: bytes, deadline: Deadline) -> None:
        rows.check_size(key, value)
        await self._agents.ask(lambda client: client.kv.put(self._key(key), value), f"writing {key!r}", deadline)
        self._remember(key, value)

    async def create(self, key: str, value: bytes, deadline: Deadline) -> bool:
        """See `Registry.create`."""
        rows.check_size(key, value)
        num_tries = 0

        async def put(client: Any) -> bool:
            nonlocal num_tries
            num_tries += 1
            if await self._put_new(client, key, value):
                return True
            # An earlier try may have succeeded though its answer was lost.
            return num_tries > 1 and (await client.kv.get(self._key(key)))[1]["Value"] == value

        has_created = await self._agents.ask(put, f"creating {key!r}", deadline)
        if has_created:
            self._remember(key, value)
        return has_created

    async def replace(self, key: str, before: bytes, value: bytes, deadline: Deadline) -> bool:
        """See `Registry.replace`."""
        rows.check_size(key, value)
        num_tries = 0

        async def put(client: Any) -> bool:
            nonlocal num_tries
            num_tries += 1
            _, found = await client.kv.get(self._key(key))
            present = None if found is None else bytes(found["Value"] or b"")
            if present != before:
                # An earlier try may have succeeded though its answer was lost.
                return num_tries > 1 and present == value
            has_put: bool = await client.kv.put(self._key(key), value, cas=found["ModifyIndex"])
            return has_put

        has_replaced = await self._agents.ask(put, f"replacing {key!r}", deadline)
        if has_replaced:
            self._remember(key, value)
        return has_replaced

    async def delete(self, key: str) -> None:
        self._written.pop(key, None)
        await self._agents.ask(lambda client: client.kv.delete(self._key(key)), f"deleting {key!r}")

    def feed(self, prefix: str) -> Feed[bytes]:
        """The feed of the folder in which the keys under `prefix` lie; its keys are full ones."""
        folder = rows.folder_of(prefix)

        async def fetch(client: Any, index: int | None, wait: str | None) -> tuple[int, dict[str, bytes]]:
            found, entries = await client.kv.get(self._key(folder), index=index, wait=wait, recurse=True)
            skip = len(self._folder)
            return int(found), {rows.unquote_key(entry["Key"][skip:]): entry["Value"] or b"" for entry in entries or ()}

        return self._feeds.of(f"documents {folder!r}", fetch)

    async def establish(self, deadline: Deadline | None = None) -> None:
        """Knows the name of the mesh from now on, and gives it one where it has none: to be done before anything is written."""
        if self._mesh is None:
            self._mesh = await self._agents.ask(self._name_mesh, "naming the mesh", deadline)
        if not self._is_following and not self._tasks.has_closed:
            self._is_following = True
            self._tasks.start(self._follow_mesh(), "registry: name of the mesh")

    async def look(self) -> None:
        """Restores what has to be restored. Raises Outage."""
        if not self._must_restore:
            return
        self._mesh = await self._agents.once(self._name_mesh, "naming the mesh", _TRY_S)
        for key, written in tuple(self._written.items()):
            written.was_seen = False
            if await self._agents.once(partial(self._put_new, key=key, value=written.value), f"restoring {key!r}", _TRY_S):
                _LOG.info("document %s was restored", key)
        self._must_restore = False

    async def _put_new(self, client: Any, key: str, value: bytes) -> bool:
        """Puts a document where none is; says whether it did."""
        has_put: bool = await client.kv.put(self._key(key), value, cas=0)
        return has_put

    async def _name_mesh(self, client: Any) -> str:
        await client.kv.put(self._mesh_key, secrets.token_hex(8), cas=0)
        _, found = await client.kv.get(self._mesh_key)
        if found is None:
            raise Outage("the name of the mesh vanished as it was written")
        return bytes(found["Value"]).decode()

    async def _follow_mesh(self) -> None:
        async def fetch(client: Any, index: int | None, wait: str | None) -> tuple[int, dict[str, str]]:
            found, entry = await client.kv.get(self._mesh_key, index=index, wait=wait)
            return int(found), {} if entry is None else {"mesh": bytes(entry["Value"] or b"").decode("utf-8", "replace")}

        feed: Feed[str] = self._feeds.of("the name of the mesh", fetch, settle_s=0.0)
        async for seen in feed.subscribe():
            self._compare(seen.get("mesh"))

    def _compare(self, mesh: str | None) -> None:
        if mesh != self._mesh and not self._must_restore:
            _LOG.warning("Consul has lost this mesh's data; what this process knows is registered and written again")
            self._must_restore = True
            self._on_reset()

    def _remember(self, key: str, value: bytes) -> None:
        self._written[key] = _Written(value)
        folder = rows.folder_of(key)
        if folder not in self._followed and not self._tasks.has_closed:
            self._followed.add(folder)
            self._tasks.start(self._follow_folder(folder), f"registry: own documents in {folder!r}")

    async def _follow_folder(self, folder: str) -> None:
        async for seen in self.feed(folder).subscribe():
            await self._forget_changed(folder, seen)

    async def _forget_changed(self, folder: str, seen: Mapping[str, bytes]) -> None:
        """Forgets what others have changed or deleted, unless Consul is what has forgotten it."""
        changed = []
        for key, written in self._written.items():
            if rows.folder_of(key) == folder:
                if seen.get(key) == written.value:
                    written.was_seen = True
                elif written.was_seen:
                    changed.append((key, written))
        if not changed or self._must_restore:
            return
        try:
            _, found = await self._agents.once(lambda client: client.kv.get(self._mesh_key), "reading the name of the mesh", _TRY_S)
        except Outage:
            return  # the feed will show them again
        mesh = None if found is None else bytes(found["Value"] or b"").decode("utf-8", "replace")
        if mesh != self._mesh:
            self._compare(mesh)
            return
        for key, written in changed:
            if self._written.get(key) is written:
                del self._written[key]

    def _key(self, key: str) -> str:
        return self._folder + rows.quote_key(key)

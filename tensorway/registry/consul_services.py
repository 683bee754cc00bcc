"""What is asked of a Consul agent about single services, and the door through which one process at a time registers an id."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

from consul.callback import CB  # type: ignore[import-untyped]
from consul.exceptions import ConsulException  # type: ignore[import-untyped]

from tensorway.deadline import Deadline
from tensorway.errors import TensorwayError, Unavailable
from tensorway.registry import consul_rows as rows
from tensorway.registry.consul_agents import Agents, Outage
from tensorway.registry.consul_entries import EntryReader
from tensorway.registry.consul_rows import Row
from tensorway.registry.consul_url import Address, ConsulUrl
from tensorway.registry.port import Registration

_LOG = logging.getLogger(__name__)

#: An agent answers in milliseconds what it need not ask a server for.
PING_S: Final = 2.0
_NEWS_WAIT: Final = "1s"
#: Whoever dies in the doorway frees it after 10 to 20 s.
_DOOR_TTL_S: Final = 10


class Services:
    """Calls about services of `url`'s mesh."""

    def __init__(self, url: ConsulUrl, agents: Agents) -> None:
        self._url = url
        self._agents = agents

    async def put(self, client: Any, payload: Mapping[str, Any]) -> None:
        """Registers at the agent of `client`, checks included; the status of a check that is there stays."""
        path, params = "/v1/agent/service/register", [("replace-existing-checks", "true")]
        await client.http.put(CB.boolean(), path, params=params, headers=client.prepare_headers(), data=json.dumps(payload))

    async def look(self, service: str) -> dict[str, Any]:
        """What the agent itself, without asking any server, knows of a service: `Service` and `Checks`, or nothing. Raises Outage."""

        def ask(client: Any) -> Awaitable[dict[str, Any]]:
            path = f"/v1/agent/health/service/id/{service}"
            answer: Awaitable[dict[str, Any]] = client.http.get(_read_health, path, headers=client.prepare_headers())
            return answer

        return await self._agents.once(ask, "looking at the own registration", PING_S, needs_leader=False)

    async def report(self, service: str) -> bool:
        """Passes the TTL check of a service; says whether the agent knows it. Raises Outage."""
        path = f"/v1/agent/check/pass/{rows.liveness_check_id(service)}"
        return await self._agents.once(
            lambda client: client.http.put(_read_report, path, headers=client.prepare_headers()), "reporting liveness", PING_S,
            needs_leader=False,
        )

    async def row(self, client: Any, registration: Registration, index: int | None = None) -> tuple[int, Row | None]:
        """The live row of the registration's id, whoever owns it; waits a while for news after `index`."""
        service = rows.service_name(self._url.prefix, registration.kind)
        # Consul picks the row: there may be a thousand of the kind.
        wanted = f'Service.ID == "{rows.service_id(self._url.prefix, registration.kind, registration.id)}"'
        found, seen = await read_service(client, service, EntryReader(), index, _NEWS_WAIT if index else None, wanted)
        return found, rows.live_rows(seen).get(registration.id)

    async def wait_row(self, registration: Registration, holds: Callable[[Row | None], bool], deadline: Deadline) -> None:
        """Returns once the servers know what the agent was told, which takes milliseconds. Raises Unavailable."""
        index: int | None = None
        what = f"looking for {registration.kind} {registration.id!r}"
        while not deadline.has_expired():
            index, row = await self._agents.ask(partial(self.row, registration=registration, index=index), what, deadline)
            if holds(row):
                return
        raise Unavailable(f"registry: {what}: the agent at {self._agents.address} does not pass it on to the servers", field="registry")

    async def deregister_at(self, address: Address, service: str) -> bool:
        """Takes a service away from an agent that is not in use; says whether it answered."""
        try:
            await self._agents.at(address, lambda client: client.agent.service.deregister(service), PING_S)
        except Outage as error:
            _LOG.debug("%s is still registered at an agent that was left: %s", service, error)
            return False
        return True

    @asynccontextmanager
    async def door(self, registration: Registration, owner: str, what: str, deadline: Deadline) -> AsyncIterator[None]:
        """One registers an id at a time, wherever: else two could both look, see nobody, and register."""
        ask = self._agents.ask
        key = f"{self._url.prefix}/doors/{registration.kind}/{rows.quote_key(registration.id)}"
        session = await ask(
            lambda client: client.session.create(name=key, lock_delay=0, behavior="delete", ttl=_DOOR_TTL_S), what, deadline
        )
        try:
            while not await ask(lambda client: client.kv.put(key, owner, acquire=session), what, deadline):
                if deadline.has_expired():
                    raise Unavailable(f"registry: {what}: another process is registering that id", field="registry")
                index, held = await ask(lambda client: client.kv.get(key), what, deadline)
                if held is not None:
                    await ask(partial(_wait_for_news, key=key, index=index), what, deadline)
            yield
        finally:
            try:
                await self._agents.once(lambda client: client.session.destroy(session), what, PING_S)
            except (Outage, TensorwayError) as error:
                _LOG.info("the session of %s ends by itself: %s", key, error)


async def _wait_for_news(client: Any, key: str, index: str) -> None:
    await client.kv.get(key, index=index, wait=_NEWS_WAIT)


async def read_service(
    client: Any, service: str, reader: EntryReader, index: int | None, wait: str | None, wanted: str = ""
) -> tuple[int, list[Row]]:
    """The index and the rows of a service, live or not; `wanted` is a filter in Consul's words. With `index`, waits for a later one."""
    params = [(name, value) for name, value in (("index", index), ("wait", wait), ("dc", client.dc), ("filter", wanted)) if value]

    def read(response: Any) -> tuple[int, list[Row]]:
        CB.boolean()(response)
        try:
            return int(response.headers["X-Consul-Index"]), reader.read(response.body)
        except (ValueError, KeyError) as error:
            raise ConsulException(f"what answers for {service} is not Consul: {error!r}") from error

    found: tuple[int, list[Row]] = await client.http.get(
        read, f"/v1/health/service/{service}", params=params, headers=client.prepare_headers()
    )
    return found


def _read_health(response: Any) -> dict[str, Any]:
    """200, 429 and 503 say how the service is, 404 that there is none; Consul writes `null` for its parts then."""
    if response.code in (200, 429, 503, 404):
        try:
            found: dict[str, Any] = json.loads(response.body)
        except ValueError:
            return {}  # 404 and 503 of another origin have words for a body
        return found
    CB.boolean()(response)
    return {}


def _read_report(response: Any) -> bool:
    """Whether the agent knows the check: it answers 404, older agents 500, where it does not."""
    if response.code in (404, 500) and ("associated TTL" in response.body or "nknown check" in response.body):
        return False
    passed: bool = CB.boolean()(response)
    return passed

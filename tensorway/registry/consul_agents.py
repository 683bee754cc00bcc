"""The agents of one registry URL: one of them is in use, the next takes its place when it is lost.

Speaks through py-consul; every call of it that leaves the process goes through `Agents.once` or `Agents.ask`, which bound it, sort what
goes wrong by who must act, and read the token again when Consul no longer knows it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import aiohttp
from consul import exceptions  # type: ignore[import-untyped]

from tensorway.deadline import Deadline
from tensorway.errors import FailedPrecondition, PermissionDenied, Unavailable
from tensorway.registry.consul_http import AgentClient, is_refusal
from tensorway.registry.consul_url import Address, ConsulUrl
from tensorway.registry.outages import OUTAGES

_LOG = logging.getLogger(__name__)

#: Patience of one operation of the port while Consul does not answer.
OPERATION_S: Final = 10.0
_LEAST_TRY_S: Final = 2.5
_FIRST_BACK_OFF_S: Final = 0.05
_MAX_BACK_OFF_S: Final = 1.0
#: An agent that has no leader for this long is left for the next, where there is one: it may be the one that is cut off. (It holds each
#: request for seven seconds before it says so.)
_LEADERLESS_S: Final = 5.0
#: An agent answers in milliseconds what it need not ask a server for.
_SILENT_S: Final = 2.0

T = TypeVar("T")
#: One call of py-consul.
Operation = Callable[[Any], Awaitable[T]]


class Outage(Exception):
    """Consul did not answer, or cannot at present. Never leaves this package: it becomes Unavailable, or another look."""


class BackOff:
    """Waits that double up to a second, with jitter, so that many processes do not come back at one instant."""

    def __init__(self) -> None:
        self._wait_s = _FIRST_BACK_OFF_S

    def reset(self) -> None:
        self._wait_s = _FIRST_BACK_OFF_S

    async def wait(self, limit_s: float = _MAX_BACK_OFF_S) -> None:
        wait_s = self._wait_s * random.uniform(0.5, 1.0)
        self._wait_s = min(_MAX_BACK_OFF_S, 2 * self._wait_s)
        await asyncio.sleep(max(0.0, min(wait_s, limit_s)))


class Agents:
    """The agents of `url`. `on_doubt` is called when what was known may be stale: an agent was lost, or another is used.

    Lives in one event loop; nothing is opened before the first use.
    """

    def __init__(self, url: ConsulUrl) -> None:
        self._url = url
        self._client: Any = None
        self._opening = asyncio.Lock()
        self._index = 0
        self._token = ""
        self._token_stamp: tuple[int, int] | None = None
        self._away_since_s: float | None = None
        self._why_left = Outage("another agent is used now")
        #: Counts the agents that have been used: a registration made with an earlier number is elsewhere.
        self.generation = 0
        #: Counts the tokens: a registration carries the token with which Consul keeps it in step.
        self.token_number = 0
        self.on_doubt: Callable[[], None] = lambda: None

    @property
    def address(self) -> Address:
        """Of the agent in use."""
        return self._url.addresses[self._index]

    @property
    def is_away(self) -> bool:
        """Whether the last answer that needed a leader was none."""
        return self._away_since_s is not None

    async def ask(self, operation: Operation[T], what: str, deadline: Deadline | None = None) -> T:
        """Does `operation`, again and again while Consul is away. Raises Unavailable with address and cause at the deadline (10 s)."""
        deadline = deadline or Deadline.after(OPERATION_S)
        back_off = BackOff()
        while True:
            try:
                return await self.once(operation, what, self._try_s(deadline))
            except Outage as error:
                if deadline.remaining_s() <= _FIRST_BACK_OFF_S:
                    raise Unavailable(f"registry: {what}: {error}", field="registry", retry_after_s=1.0) from error
                await back_off.wait(deadline.remaining_s())

    async def once(self, operation: Operation[T], what: str, timeout_s: float, needs_leader: bool = True) -> T:
        """Does `operation` once. Raises Outage where another try may help, PermissionDenied or FailedPrecondition where not."""
        client = await self._open()
        address = self.address
        try:
            async with asyncio.timeout(timeout_s):
                answer = await operation(client)
        except TimeoutError as error:
            outage = self._outage(f"the Consul agent at {address} did not answer within {timeout_s:.1f} s", needs_leader, client)
            if not needs_leader:
                # It asks health no sooner than it answers: when it goes on, it may take everybody for dead for a moment.
                self.on_doubt()
            if await self._is_silent(client):
                await self.leave(client, outage)
            raise outage from error
        except (aiohttp.ClientError, OSError) as error:
            if is_refusal(error):
                raise FailedPrecondition(f"registry: TLS with the Consul agent at {address} fails: {error}", field="registry") from error
            cause = getattr(error, "os_error", error)
            outage = self._outage(f"the Consul agent at {address} cannot be reached: {cause}", needs_leader, client)
            if isinstance(error, aiohttp.ClientConnectorError):
                await self.leave(client, outage)
            raise outage from error
        except exceptions.ACLPermissionDenied as error:
            raise await self._denied(what, address, str(error)) from error
        except (exceptions.BadRequest, exceptions.ClientError, exceptions.NotFound, exceptions.ACLDisabled) as error:
            raise FailedPrecondition(f"registry: {what}: Consul at {address} refuses: {error}", field="registry") from error
        except exceptions.ConsulException as error:
            outage = self._outage(f"Consul at {address} cannot at present: {str(error).strip()}", needs_leader, client)
            if self._away_since_s is not None and time.monotonic() - self._away_since_s > _LEADERLESS_S:
                await self.leave(client, outage)
            raise outage from error
        if needs_leader:
            self._answered()
        return answer

    async def leave(self, client: Any, why: Outage) -> None:
        """The agent of `client` is lost: where it is the one in use, the next takes its place. With one address alone it is tried again."""
        if client is not self._client:
            return
        self.on_doubt()
        if len(self._url.addresses) == 1:
            return
        self._client, self._why_left = None, why
        self._index = (self._index + 1) % len(self._url.addresses)
        self.generation += 1
        self._away_since_s = None
        OUTAGES.is_away = False
        _LOG.warning("registry: %s; the agent at %s is used now", why, self.address)
        await client.close()

    async def at(self, address: Address, operation: Operation[T], timeout_s: float) -> T:
        """One call of another agent. Raises Outage."""
        await self._open()  # the token is known after it
        client = AgentClient(self._url, address, await asyncio.to_thread(self._tls), self._token)
        try:
            async with asyncio.timeout(timeout_s):
                return await operation(client)
        except (TimeoutError, aiohttp.ClientError, OSError, exceptions.ConsulException) as error:
            raise Outage(f"the Consul agent at {address}: {error!r}") from error
        finally:
            await client.close()

    async def look_at_token(self) -> None:
        """Reads the token file again where it was replaced: before Consul forgets the old token, if its owner is careful."""
        if self._url.token_file and self._client is not None:
            stamp = await asyncio.to_thread(self._stamp)
            if stamp is not None and stamp != self._token_stamp:
                await self._renew_token()

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    async def _open(self) -> Any:
        async with self._opening:
            if self._client is None:
                tls, (self._token, self._token_stamp) = await asyncio.to_thread(lambda: (self._tls(), self._read_token()))
                self._client = AgentClient(self._url, self.address, tls, self._token)
            return self._client

    def _tls(self) -> ssl.SSLContext | None:
        url = self._url
        if url.scheme != "https":
            return None
        try:
            context = ssl.create_default_context(cafile=url.ca_file or None)
            if url.cert_file:
                context.load_cert_chain(url.cert_file, url.key_file)
        except OSError as error:
            files = ", ".join(name for name in (url.ca_file, url.cert_file, url.key_file) if name)
            raise FailedPrecondition(f"registry: the certificates {files} cannot be read: {error}", field="registry") from error
        return context

    def _read_token(self) -> tuple[str, tuple[int, int] | None]:
        if not self._url.token_file:
            return "", None
        try:
            stamp = self._stamp()
            return Path(self._url.token_file).read_text(encoding="ascii").strip(), stamp
        except (OSError, UnicodeDecodeError) as error:
            raise FailedPrecondition(f"registry: token_file {self._url.token_file} cannot be read: {error}", field="registry") from error

    def _stamp(self) -> tuple[int, int] | None:
        try:
            state = Path(self._url.token_file).stat()
        except OSError:
            return None  # being replaced: there will be one at the next look
        return state.st_mtime_ns, state.st_ino

    async def _renew_token(self) -> bool:
        """Whether the file holds another token than the one in use; it is used from now on."""
        token, self._token_stamp = await asyncio.to_thread(self._read_token)
        if token == self._token:
            return False
        _LOG.info("another token was found in %s", self._url.token_file)
        self._token = token
        self.token_number += 1
        if self._client is not None:
            self._client.token = token or None
        return True

    async def _denied(self, what: str, address: Address, answer: str) -> Exception:
        if "ACL not found" not in answer:
            place = f"the token in {self._url.token_file}" if self._url.token_file else "no token (set token_file)"
            return PermissionDenied(f"registry: {what}: Consul at {address} denies it to {place}: {answer.strip()}", field="registry")
        if self._url.token_file and await self._renew_token():
            return Outage("the token was replaced")
        file = self._url.token_file or "(no token_file)"
        return self._outage(f"Consul at {address} does not know the token in {file}", True, self._client)

    def _outage(self, cause: str, needs_leader: bool, client: Any) -> Outage:
        if client is not self._client:
            return self._why_left  # what broke it off was that the agent was left
        OUTAGES.num_errors += 1
        if needs_leader and self._away_since_s is None:
            self._away_since_s = time.monotonic()
            OUTAGES.is_away = True
            _LOG.warning("registry: %s; going on with what is known", cause)
        return Outage(cause)

    def _answered(self) -> None:
        if self._away_since_s is not None:
            _LOG.info("registry: Consul at %s answers again after %.1f s", self.address, time.monotonic() - self._away_since_s)
            self._away_since_s = None
            OUTAGES.is_away = False

    async def _is_silent(self, client: Any) -> bool:
        """Whether the agent itself, not the servers that it asks, gives no answer. (A process that was stopped finds its timeouts passed
        and the answers waiting.)"""
        try:
            async with asyncio.timeout(_SILENT_S):
                await client.http.get(lambda response: response, "/v1/agent/health/service/id/none", headers=client.prepare_headers())
        except (TimeoutError, aiohttp.ClientError, OSError):
            return True
        return False

    def _try_s(self, deadline: Deadline) -> float:
        """Time for one try: with several agents, each has its turn before the deadline; enough for a short blocking query in any case."""
        share_s = OPERATION_S if len(self._url.addresses) == 1 else OPERATION_S / (len(self._url.addresses) + 1)
        return max(_LEAST_TRY_S, min(share_s, deadline.remaining_s()))

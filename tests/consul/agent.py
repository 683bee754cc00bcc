"""Real Consul agents for tests: one alone (`dev_agent`), or several servers that elect a leader (`cluster`).

Each agent is a process of its own with free ports, ends with the test process however that ends, and can be hurt: `kill` (SIGKILL), `stop`
(SIGSTOP), `cont` (SIGCONT), `terminate` (SIGTERM), `restart` (with or without its data). A `Place` says on which address it listens and
through which command it is started, e.g. `Place("192.0.2.2", ("ip", "netns", "exec", "server-1"))`.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp

from tests.consul.binary import bring_consul

#: Patience for an agent to start, and for a leader to be elected, on a slow machine.
READY_S = 40.0
_LOOK_S = 0.05
_CALL_S = 5.0
#: Asks one thing over HTTP from within another network namespace: argv is method, URL, body and token; prints status and body.
_ASK = """
import sys, urllib.error, urllib.request
method, url, body, token = sys.argv[1:]
request = urllib.request.Request(url, body.encode() or None, {"X-Consul-Token": token} if token else {}, method=method)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    answer = opener.open(request, timeout=5)
except urllib.error.HTTPError as error:
    answer = error
print(answer.status, answer.read().decode(), end="")
"""


class AgentError(Exception):
    """An agent did not start, or refused what a test asked of it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an agent runs: the address that it binds, and the command through which it starts (empty: as it is)."""

    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ports:
    """Consul's own defaults, for an agent that has its address to itself."""

    http: int = 8500
    dns: int = 8600
    server: int = 8300
    serf_lan: int = 8301


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files of one agent's TLS: its HTTP port then speaks HTTPS only, and wants client certificates that `ca` signed."""

    ca: Path
    certificate: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.ca))
        context.load_cert_chain(self.certificate, self.key)
        return context


@dataclass(eq=False)
class Agent:
    """One agent. Made by `dev_agent` and `cluster`, which end it."""

    name: str
    folder: Path
    place: Place
    ports: Ports
    #: Its whole configuration file.
    config: Mapping[str, Any]
    is_dev: bool
    #: Sent with every call of the test's own.
    token: str = ""
    certificates: Certificates | None = None
    process: asyncio.subprocess.Process | None = None
    is_stopped: bool = False

    @property
    def http(self) -> str:
        """`host:port` of its HTTP API."""
        return f"{self.place.address}:{self.ports.http}"

    @property
    def dns(self) -> tuple[str, int]:
        return self.place.address, self.ports.dns

    @property
    def is_running(self) -> bool:
        """Whether it runs and is not stopped."""
        return self.process is not None and self.process.returncode is None and not self.is_stopped

    def registry_url(self, prefix: str = "", **options: object) -> str:
        """The registry URL of services that use this agent."""
        return registry_url((self,), prefix, **options)

    async def start(self) -> None:
        """Starts the process; see `wait_ready`."""
        assert self.process is None or self.process.returncode is not None, f"{self.name} runs already"
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "config.json"
        config.write_text(json.dumps(self.config))
        consul = await asyncio.to_thread(bring_consul)
        tied = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
        dev = ("-dev",) if self.is_dev else ()
        with (self.folder / "log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.place.prefix, *tied, str(consul), "agent", *dev, f"-config-file={config}",
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
            )
        self.is_stopped = False

    async def wait_ready(self) -> None:
        """Returns once there is a leader and this agent's own node passes in the catalog: from then on it accepts sessions."""

        async def passes() -> bool:
            checks = await self.call("GET", f"/v1/health/node/{self.name}?consistent")
            return any(check["CheckID"] == "serfHealth" and check["Status"] == "passing" for check in checks)

        await self._until(passes, "ready")

    async def kill(self) -> None:
        await self._end(signal.SIGKILL)

    async def terminate(self) -> None:
        """SIGTERM: a server that goes this way stays a member of its cluster."""
        await self._end(signal.SIGTERM)

    def stop(self) -> None:
        """SIGSTOP: it holds its connections and answers nothing."""
        self._living().send_signal(signal.SIGSTOP)
        self.is_stopped = True

    def cont(self) -> None:
        self._living().send_signal(signal.SIGCONT)
        self.is_stopped = False

    async def restart(self, keep_data: bool = True) -> None:
        """Kills it where it runs, and starts it again on the same ports; returns once it is ready. A dev agent keeps nothing anyway."""
        await self.kill()
        if not keep_data:
            shutil.rmtree(self.folder / "state", ignore_errors=True)
        await self.start()
        await self.wait_ready()

    async def call(self, method: str, path: str, body: object = None, token: str | None = None) -> Any:
        """One call of its HTTP API: the decoded JSON (or None for no body). Raises AgentError for an error status or no answer."""
        text = body if isinstance(body, str) else "" if body is None else json.dumps(body)
        scheme = "https" if self.certificates else "http"
        status, answer = await self._ask(method, f"{scheme}://{self.http}{path}", text, self.token if token is None else token)
        if status >= 400:
            raise AgentError(f"{self.name}: {method} {path}: {status} {answer}")
        return json.loads(answer) if answer.strip() else None

    def last_lines(self, num_bytes: int = 4000) -> str:
        """The end of its log."""
        log = self.folder / "log"
        return log.read_bytes()[-num_bytes:].decode("utf-8", "replace") if log.exists() else ""

    async def _ask(self, method: str, url: str, body: str, token: str) -> tuple[int, str]:
        if self.place.prefix:
            asking = await asyncio.create_subprocess_exec(
                *self.place.prefix, sys.executable, "-I", "-c", _ASK, method, url, body, token,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            )
            try:
                async with asyncio.timeout(_CALL_S + 5):
                    output, _ = await asking.communicate()
            except TimeoutError as error:
                asking.kill()
                raise AgentError(f"{self.name} does not answer") from error
            status, _, answer = output.decode().partition(" ")
            if not status:
                raise AgentError(f"{self.name} does not answer")
            return int(status), answer
        try:
            context = self.certificates.context() if self.certificates else True
            timeout = aiohttp.ClientTimeout(total=_CALL_S)
            async with aiohttp.ClientSession(timeout=timeout) as http, http.request(
                method, url, data=body.encode() or None, headers={"X-Consul-Token": token} if token else {}, ssl=context
            ) as response:
                return response.status, await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise AgentError(f"{self.name} does not answer: {error!r}") from error

    async def _until(self, holds: Callable[[], Any], what: str) -> None:
        last: Exception | None = None
        try:
            async with asyncio.timeout(READY_S):
                while True:
                    try:
                        if await holds():
                            return
                    except AgentError as error:
                        last = error
                    process = self.process
                    if process is None or process.returncode is not None:
                        raise AgentError(f"{self.name} ended before it was {what}:\n{self.last_lines()}")
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError as error:
            raise AgentError(f"{self.name} was not {what} within {READY_S:g} s ({last}):\n{self.last_lines()}") from error

    def _living(self) -> asyncio.subprocess.Process:
        assert self.process is not None and self.process.returncode is None, f"{self.name} does not run"
        return self.process

    async def _end(self, number: signal.Signals) -> None:
        process = self.process
        if process is None or process.returncode is not None:
            return
        process.send_signal(number)
        if self.is_stopped and number != signal.SIGKILL:
            process.send_signal(signal.SIGCONT)
        try:
            async with asyncio.timeout(15):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        self.is_stopped = False


@dataclass(eq=False)
class Cluster:
    """Servers that elect a leader among themselves."""

    servers: tuple[Agent, ...]

    def registry_url(self, prefix: str = "", **options: object) -> str:
        """The registry URL of services that may use any of the servers, the first one first."""
        return registry_url(self.servers, prefix, **options)

    async def leader(self) -> Agent:
        """The leader, on which all servers that run agree; waits for an election."""
        for_message: object = None
        try:
            async with asyncio.timeout(READY_S):
                while True:
                    found = await asyncio.gather(*(self._leader_seen_by(server) for server in self.servers if server.is_running))
                    for_message = found
                    leaders = {f"{server.place.address}:{server.ports.server}": server for server in self.servers if server.is_running}
                    if found and len(set(found)) == 1 and found[0] in leaders:
                        return leaders[found[0]]
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError as error:
            raise AgentError(f"the servers agreed on no leader within {READY_S:g} s: {for_message}") from error

    async def follower(self) -> Agent:
        """One that runs and does not lead."""
        leader = await self.leader()
        return next(server for server in self.servers if server.is_running and server is not leader)

    async def wait_ready(self) -> None:
        """Returns once every server that runs is ready."""
        await self.leader()
        await asyncio.gather(*(server.wait_ready() for server in self.servers if server.is_running))

    @staticmethod
    async def _leader_seen_by(server: Agent) -> str:
        try:
            return str(await server.call("GET", "/v1/status/leader"))
        except AgentError:
            return ""


def registry_url(agents: Sequence[Agent], prefix: str = "", **options: object) -> str:
    """`consul://A,B/PREFIX?option=value` over the HTTP ports of `agents`."""
    url = f"consul://{','.join(agent.http for agent in agents)}"
    return url + (f"/{prefix}" if prefix else "") + (f"?{urlencode(options)}" if options else "")


@asynccontextmanager
async def dev_agent(
    folder: Path, name: str = "agent", *, place: Place | None = None, ports: Ports | None = None, persistent: bool = False,
    token: str = "", certificates: Certificates | None = None, **settings: Any,
) -> AsyncIterator[Agent]:
    """One server alone, ready. It keeps nothing over a restart, unless `persistent` (which starts in 2 s rather than 0.3 s).

    `settings` are keys of Consul's configuration and replace what stands there. `folder` gets its log, configuration and state.
    """
    place = place or Place()
    config = _config(name, folder, place, ports := ports or free_ports(place), certificates, settings)
    if persistent:
        config |= {"server": True, "bootstrap_expect": 1}
    agent = Agent(name, folder, place, ports, config, not persistent, token, certificates)
    try:
        await agent.start()
        await agent.wait_ready()
        yield agent
    finally:
        await agent.kill()


@asynccontextmanager
async def cluster(
    folder: Path, num_servers: int = 3, *, places: Sequence[Place] = (), token: str = "",
    certificates: Sequence[Certificates] = (), wait: bool = True, **settings: Any,
) -> AsyncIterator[Cluster]:
    """Servers `server-1`, `server-2`, …, ready and with a leader, each at its own loopback address unless `places` says where."""
    chosen = tuple(places) or tuple(Place(f"127.0.0.{11 + index}") for index in range(num_servers))
    all_ports = tuple(free_ports(place) for place in chosen)
    join = [f"{place.address}:{ports.serf_lan}" for place, ports in zip(chosen, all_ports, strict=True)]
    joint = {"server": True, "bootstrap_expect": len(chosen), "retry_join": join, "retry_interval": "1s", **settings}
    agents = []
    for index, (place, ports) in enumerate(zip(chosen, all_ports, strict=True)):
        name, own = f"server-{index + 1}", certificates[index] if certificates else None
        config = _config(name, folder / name, place, ports, own, joint)
        agents.append(Agent(name, folder / name, place, ports, config, False, token, own))
    made = Cluster(tuple(agents))
    async with AsyncExitStack() as stack:
        for agent in agents:
            stack.push_async_callback(agent.kill)
        for agent in agents:
            await agent.start()
        if wait:
            await made.wait_ready()
        yield made


def free_ports(place: Place) -> Ports:
    """Four free ports of `place`; Consul's own where the agent starts through a command, in a namespace of its own."""
    if place.prefix:
        return Ports()
    held: list[socket.socket] = []
    try:
        found = [_hold_port(place.address, held) for _ in range(4)]
    finally:
        for each in held:
            each.close()
    return Ports(*found)


def _hold_port(address: str, held: list[socket.socket]) -> int:
    """A port that is free for TCP and UDP (gossip and DNS need both)."""
    for _ in range(100):
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        held.append(tcp)
        tcp.bind((address, 0))
        port = int(tcp.getsockname()[1])
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        held.append(udp)
        try:
            udp.bind((address, port))
        except OSError:
            continue
        return port
    raise AgentError(f"{address} has no port that is free for TCP and UDP")


def _config(
    name: str, folder: Path, place: Place, ports: Ports, certificates: Certificates | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    http = {"http": -1, "https": ports.http} if certificates else {"http": ports.http, "https": -1}
    config: dict[str, Any] = {
        "node_name": name, "data_dir": str(folder / "state"), "log_level": "info", "disable_update_check": True,
        "bind_addr": place.address, "advertise_addr": place.address, "client_addr": place.address,
        "ports": {**http, "grpc": -1, "dns": ports.dns, "server": ports.server, "serf_lan": ports.serf_lan, "serf_wan": -1},
        # Many blocking queries of one test process come from one address.
        "limits": {"http_max_conns_per_client": 1000},
        "performance": {"raft_multiplier": 1}, "leave_on_terminate": False, "skip_leave_on_interrupt": True,
    }
    if certificates:
        config |= {
            "ca_file": str(certificates.ca), "cert_file": str(certificates.certificate), "key_file": str(certificates.key),
            "verify_incoming": True, "verify_outgoing": True,
        }
    return {**config, **settings}

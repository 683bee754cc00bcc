"""A real Envoy on the shipped configurations, with free ports, other endpoints, and files where the test has them."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "deploy" / "envoy"
BINARY = Path(sys.executable).parent / "envoy"
#: Patience for an Envoy to start, or to see a change, on a slow machine.
PATIENCE_S = 30.0


def shipped(name: str) -> Any:
    """A shipped configuration, parsed."""
    return yaml.safe_load((SHIPPED / name).read_text())


def rendered(folder: Path, name: str, endpoints: Mapping[str, str] | None = None, tls: Path | None = None) -> Path:
    """The shipped configuration `name` for this machine, in `folder`, and where it is: free ports, `endpoints` by cluster, /etc/envoy as
    shipped, /etc/tensorway/tls in `tls`, and /run/envoy in `folder`. Nothing else differs."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(SHIPPED / "tensorway.pb", folder)
    for path in SHIPPED.glob("sds-*.yaml"):
        (folder / path.name).write_text(path.read_text().replace("/etc/tensorway/tls", str(tls or folder)))
    text = (SHIPPED / name).read_text().replace("/etc/envoy", str(folder)).replace("/run/envoy", str(folder))
    config = yaml.safe_load(text)
    config["admin"]["address"]["socket_address"]["port_value"] = 0
    for listener in config["static_resources"]["listeners"]:
        listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": 0}
    for cluster in config["static_resources"]["clusters"]:
        if "load_assignment" in cluster and endpoints is not None:
            hosts = [endpoint.rpartition(":") for endpoint in endpoints[cluster["name"]].split(",")]
            cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
                {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}} for host, _, port in hosts
            ]
    path = folder / name
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass(eq=False)
class Envoy:
    """A running Envoy."""

    process: asyncio.subprocess.Process
    admin: str
    listeners: dict[str, str]
    log: Path
    http: aiohttp.ClientSession

    @property
    def endpoint(self) -> str:
        """`host:port` of its only listener."""
        (endpoint,) = self.listeners.values()
        return endpoint

    async def ask(self, path: str) -> str:
        """What the admin port answers."""
        async with self.http.get(f"http://{self.admin}{path}") as response:
            return await response.text()

    async def stat(self, name: str) -> int:
        """A counter or gauge; 0 where there is none yet."""
        stats = json.loads(await self.ask(f"/stats?format=json&filter=^{name.replace('.', '[.]')}$"))["stats"]
        return int(next((item["value"] for item in stats if item.get("name") == name), 0))

    async def hosts(self, cluster: str) -> dict[str, str]:
        """Endpoints of a cluster, each with Envoy's word for its health ("healthy", or why not)."""
        lines = (await self.ask("/clusters")).splitlines()
        found = (line.split("::") for line in lines if line.startswith(f"{cluster}::"))
        return {words[1]: words[3] for words in found if len(words) == 4 and words[2] == "health_flags"}

    async def wait_hosts(self, cluster: str, holds: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        """Returns once what Envoy knows of a cluster is as wanted."""
        async with asyncio.timeout(PATIENCE_S):
            while not holds(hosts := await self.hosts(cluster)):
                assert self.process.returncode is None, self.log.read_text()[-4000:]
                await asyncio.sleep(0.05)
        return hosts

    async def wait_healthy(self, cluster: str, count: int) -> None:
        """Returns once exactly `count` endpoints are there, all healthy."""
        await self.wait_hosts(cluster, lambda hosts: len(hosts) == count and set(hosts.values()) == {"healthy"})


@asynccontextmanager
async def running_envoy(config: Path) -> AsyncIterator[Envoy]:
    """An Envoy that listens. It ends with the block; what it logged is shown when the block fails."""
    folder, name = config.parent, config.stem
    admin_file, log_file = folder / f"{name}.admin", folder / f"{name}.log"
    admin_file.unlink(missing_ok=True)
    tied = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
    with log_file.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *tied, str(BINARY), "-c", str(config), "--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning",
            "--admin-address-path", str(admin_file), stdout=log, stderr=log,
        )
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http:
            envoy = Envoy(process, "", {}, log_file, http)
            await _wait_listening(envoy, admin_file)
            yield envoy
    except BaseException:
        print(f"== {log_file}\n{log_file.read_text()[-6000:]}")
        raise
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            await process.wait()


async def _wait_listening(envoy: Envoy, admin_file: Path) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            assert envoy.process.returncode is None, envoy.log.read_text()[-4000:]
            if admin_file.exists() and admin_file.read_text():
                envoy.admin = admin_file.read_text().strip()
                try:
                    if "LIVE" in await envoy.ask("/ready"):
                        envoy.listeners = dict(_listeners(await envoy.ask("/listeners")))
                        return
                except aiohttp.ClientError:
                    pass
            await asyncio.sleep(0.02)


def _listeners(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, _, endpoint = line.partition("::")
        yield name, endpoint


def validate(config: Path) -> tuple[int, str]:
    """Exit status and output of `envoy --mode validate`."""
    command = [str(BINARY), "--mode", "validate", "-c", str(config), "--log-level", "warning"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr

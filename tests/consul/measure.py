"""`python -m tests.consul.measure`: how fast the Consul registry is, measured on real agents, as a table in Markdown."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from tensorway.registry import open_registry
from tensorway.registry.port import GROUP, NODE, Registration, Registry
from tests.consul.agent import Agent, cluster, dev_agent
from tests.contract.registry.owner import Owner, running_owner
from tests.contract.registry.views import Seen, seeing, until

_REPEATS = 5
_NUM_GROUPS = 1000


async def _took(action: Awaitable[Any]) -> float:
    began = time.monotonic()
    await action
    return time.monotonic() - began


@asynccontextmanager
async def _owned(agent: Agent, prefix: str) -> AsyncIterator[tuple[Owner, Seen[tuple[Registration, ...]], Seen[dict[str, str]]]]:
    """An owner process, and its registration and claim as another registry object sees them."""
    watcher = open_registry(agent.registry_url(prefix))
    try:
        async with (
            running_owner(agent.registry_url(prefix)) as owner,
            seeing(watcher.watch(GROUP)) as members, seeing(watcher.watch_claims("")) as claims,
        ):
            yield owner, members, claims
    finally:
        await watcher.close()


async def _deaths(agent: Agent) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for number in range(_REPEATS):
        for what, hurt in (("SIGKILL", Owner.kill), ("SIGSTOP", _stop), ("SIGTERM", _terminate)):
            async with _owned(agent, f"{what.lower()}-{number}") as (owner, members, claims):
                await asyncio.sleep(1.3)  # past the first checks
                began = time.monotonic()
                await hurt(owner)
                await members.until(lambda rows: not rows)
                found.setdefault(f"{what} of an owner → no watcher shows it", []).append(time.monotonic() - began)
                await claims.until(lambda held: not held)
                found.setdefault(f"{what} of an owner → its claim is free", []).append(time.monotonic() - began)
    return found


async def _stop(owner: Owner) -> None:
    owner.stop()


async def _terminate(owner: Owner) -> None:
    owner.process.terminate()


async def _operations(agent: Agent) -> dict[str, list[float]]:
    async with _opened(agent.registry_url("operations", check="ttl")) as registry:
        await registry.write("k", b"warm")
        found: dict[str, list[float]] = {
            "register, until everybody can see it": [
                await _took(registry.register(Registration(NODE, f"n{number}", "a:1"))) for number in range(_REPEATS)
            ],
            "claim": [await _took(registry.claim(f"c{number}", "me")) for number in range(_REPEATS)],
            "write a document": [await _took(registry.write("k", b"v")) for _ in range(_REPEATS)],
        }
        return found


async def _heals(folder: Path) -> dict[str, list[float]]:
    found = []
    async with dev_agent(folder) as agent:
        for number in range(_REPEATS):
            url = agent.registry_url(f"heals-{number}")
            async with running_owner(url) as owner, _opened(f"{url}?check=ttl") as registry:
                await registry.write("desired/m", b"1")
                await agent.restart()
                async with _opened(url) as fresh:
                    began = time.monotonic()
                    await until(fresh.watch(GROUP), lambda rows, owner=owner: rows == (owner.registration,))
                    await until(fresh.watch_claims(""), bool)
                    await until(fresh.watch_documents("desired/"), bool)
                    found.append(time.monotonic() - began)
    return {"agent back without its data → registrations, claims and documents are there again": found}


async def _elections(folder: Path) -> dict[str, list[float]]:
    found = []
    for number in range(2):
        async with cluster(folder / str(number)) as made, _opened(made.registry_url()) as registry:
            await registry.write("k", b"v")
            await (await made.leader()).kill()
            found.append(await _took(registry.write("k", b"w")))
    return {"leader of three servers killed → a write succeeds": found}


async def _crowd(folder: Path) -> dict[str, list[float]]:
    """A thousand registered groups: what one more change costs a process that watches."""
    from tensorway.registry import consul_rows

    async with dev_agent(folder) as agent, _opened(agent.registry_url("crowd", check="ttl")) as owner:
        limit = asyncio.Semaphore(20)

        async def add(number: int) -> None:
            metadata = {"model": f"m{number % 20}", "revision": "0" * 64, "epoch": "1", "node": f"n{number % 100}", "max_rows": "32"}
            group = Registration(GROUP, f"g{number}", f"192.0.2.1:{number + 1}", metadata)
            payload = consul_rows.service_payload("crowd", group, "x", 1, True)
            payload["Checks"][0]["TTL"] = "1h"
            async with limit:
                await agent.call("PUT", "/v1/agent/service/register", payload)

        await asyncio.gather(*(add(number) for number in range(_NUM_GROUPS)))
        async with _opened(agent.registry_url("crowd")) as watcher:
            await until(watcher.watch(GROUP), lambda rows: len(rows) == _NUM_GROUPS)
            first = await _took(until(watcher.watch(GROUP), lambda rows: len(rows) == _NUM_GROUPS))
            lease = await owner.register(Registration(GROUP, "last", "a:1", {"step": "-1"}))
            cpu_s, seen_s = [], []
            async with aclosing(watcher.watch(GROUP)) as views:  # type: ignore[type-var]
                await anext(views)
                for number in range(_REPEATS):
                    await asyncio.sleep(0.3)
                    began, cpu = time.monotonic(), time.process_time()
                    await lease.update(Registration(GROUP, "last", "a:1", {"step": str(number)}))
                    async for rows in views:
                        if any(row.metadata.get("step") == str(number) for row in rows):
                            break
                    seen_s.append(time.monotonic() - began)
                    cpu_s.append(time.process_time() - cpu)
        return {
            f"{_NUM_GROUPS} groups: first view": [first], f"{_NUM_GROUPS} groups: an update is seen": seen_s,
            f"{_NUM_GROUPS} groups: CPU of a watching process for one change": cpu_s,
        }


@asynccontextmanager
async def _opened(url: str) -> AsyncIterator[Registry]:
    registry = open_registry(url)
    try:
        yield registry
    finally:
        await registry.close()


async def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with dev_agent(folder / "agent") as agent:
            measured = await _deaths(agent) | await _operations(agent)
        parts: tuple[Callable[[Path], Awaitable[dict[str, list[float]]]], ...] = (_heals, _elections, _crowd)
        for index, part in enumerate(parts):
            measured |= await part(folder / str(index))
    print("| what | median, s | longest, s |\n| --- | --- | --- |")
    for what, times in measured.items():
        print(f"| {what} | {statistics.median(times):.3f} | {max(times):.3f} |")


if __name__ == "__main__":
    asyncio.run(main())

"""Real gateway processes in front of one scripted orchestrator, which counts what reaches it and answers as the model's name says."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tensorway.cli.local_mesh import LocalMesh, Member, MemberPlan, flags_of
from tensorway.errors import ModelFailed, NotFound, Overloaded, Unavailable
from tensorway.registry import open_registry
from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import GATEWAY, Registration, Registry
from tensorway.signature import RevisionSpec
from tensorway.transport.port import Exchange
from tensorway.v1 import link_pb2
from tests.contract.gateway.scripted import ECHO, WORDS, ScriptedOrchestrator, echo_reply, publish, register_group, spec, want
from tests.contract.gateway.streaming import TALKER, Pusher, answer_of, delta, started

IDENTITY = spec("identity", ECHO.signature.inputs, ECHO.signature.outputs)
#: Fails, is full, or never answers.
BROKEN, FULL, LOST, ENDLESS = (spec(name, ECHO.signature.inputs, ECHO.signature.outputs) for name in ("broken", "full", "lost", "endless"))
#: Says its first token at once and the rest when `Fleet.go_on` is set.
SLOW_TALKER = replace(TALKER, model="slow-talker", revision=b"slow-talker".hex().ljust(64, "0"))
SPECS: tuple[RevisionSpec, ...] = (ECHO, WORDS, IDENTITY, BROKEN, FULL, LOST, ENDLESS, TALKER, SLOW_TALKER)
NUM_TOKENS = 5


@dataclass(eq=False)
class Fleet:
    """What a test holds."""

    processes: LocalMesh
    registry: Registry
    registry_url: str
    orchestrator: ScriptedOrchestrator
    #: Requests that reached the orchestrator, by model.
    arrived: Counter[str] = field(default_factory=Counter)
    #: Seconds that the last request for a model still had when it arrived.
    remaining_s: dict[str, float] = field(default_factory=dict)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    _waiting: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self, name: str, registry_url: str = "", **more: object) -> Registration:
        """One more gateway, registered. `more`: its settings."""
        flags = {"id": name, "registry": registry_url or self.registry_url, "listen": "127.0.0.1:0", "ops_listen": "127.0.0.1:0"}
        member = await self.processes.start_member(MemberPlan(name, "gateway", flags_of({**flags, "log_format": "json", **more})))
        return await self._wait_registered(name, member)

    async def stop(self, name: str) -> int:
        """SIGTERM; its exit status."""
        member = self.processes.members[name]
        await self.processes.stop_member(member)
        assert member.process.returncode is not None
        return member.process.returncode

    async def kill(self, name: str) -> None:
        """SIGKILL."""
        member = self.processes.members.pop(name)
        member.process.kill()
        await member.process.wait()

    async def endpoints(self) -> str:
        """Of all gateways, joined by commas."""
        return ",".join(member.endpoint for member in await self.registry.registrations(GATEWAY))

    async def _wait_registered(self, name: str, member: Member) -> Registration:
        async with asyncio.timeout(60):
            async for found in self.registry.watch(GATEWAY):
                assert member.process.returncode is None, member.last_lines()
                for registration in found:
                    if registration.id == name:
                        return registration
        raise AssertionError("a watch never ends")

    def script(self, exchange: Exchange, head: link_pb2.RequestHead) -> None:
        """What the orchestrator does with a request."""
        self.arrived[head.model] += 1
        self.remaining_s[head.model] = exchange.deadline.remaining_s()
        if head.model == "broken":
            exchange.fail(ModelFailed("the model divides by zero"))
        elif head.model == "full":
            exchange.fail(Overloaded("the queue is full", retry_after_s=1.5))
        elif head.model == "lost":
            exchange.fail(Unavailable("no group is left"))
        elif head.model == "talker":
            Pusher(exchange, answer_of(NUM_TOKENS), lambda: exchange.reply(b"", ()))
        elif head.model == "slow-talker":
            Pusher(exchange, [started(), delta(1, 0)], lambda: None)
            waiting = asyncio.ensure_future(self._rest(exchange))
            self._waiting.add(waiting)
            waiting.add_done_callback(self._waiting.discard)
        elif not head.model:
            exchange.fail(NotFound("that stream is kept no longer"))
        elif head.model != "endless":
            exchange.reply(*echo_reply(head, exchange.payload, SPECS))

    async def _rest(self, exchange: Exchange) -> None:
        await self.go_on.wait()
        Pusher(exchange, answer_of(NUM_TOKENS)[2:], lambda: exchange.reply(b"", ()))

    async def close(self) -> None:
        """Ends what the script still waits for."""
        for waiting in self._waiting:
            waiting.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)


@asynccontextmanager
async def running_fleet(folder: Path, gateways: int = 2, **settings: object) -> AsyncIterator[Fleet]:
    """A ready fleet; `settings` of its first gateways. What the gateways logged is shown when the block fails."""
    url = f"directory:{folder / 'registry'}"
    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(DirectoryRegistry(folder / "registry"))
        for item in SPECS:
            await publish(registry, item)
            await want(registry, item)
            await register_group(registry, item)
        processes = await stack.enter_async_context(LocalMesh(folder / "logs", grace_s=20))
        orchestrator = ScriptedOrchestrator("orchestrator-1")
        watching = open_registry(url)
        stack.push_async_callback(watching.close)
        fleet = Fleet(processes, watching, url, orchestrator)
        stack.push_async_callback(fleet.close)
        orchestrator.script = fleet.script
        stack.push_async_callback(orchestrator.stop)
        await orchestrator.start(registry, "completion-queue")
        try:
            await asyncio.gather(*(fleet.start(f"gateway-{number + 1}", **settings) for number in range(gateways)))
            yield fleet
        except BaseException:
            for path in sorted(processes.log_dir.glob("*.log")):
                print(f"== {path.name}\n{path.read_text()[-4000:]}")
            raise

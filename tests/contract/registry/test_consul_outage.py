"""Consul hurt while watchers watch and owners hold: nothing that lives is ever shown as gone, and what Consul forgot comes back.

Most of these scenarios wait for times to pass: those that do are played at the same time, each with agents of its own.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tensorway.errors import Unavailable
from tensorway.registry.port import GROUP, NODE, Lease, Registration, Registry
from tests.consul.agent import Agent, cluster, dev_agent
from tests.contract.registry.conftest import Ground, ground_of
from tests.contract.registry.owner import CLAIM, ID, Owner, running_owner
from tests.contract.registry.views import PATIENCE_S, Seen, seeing, together, until

#: Longer than the time for which removals are held back after an outage.
SETTLED_S = 6.0


@dataclass
class Scene:
    """An owner process, an owner in this process, and a third party that watches everything."""

    ground: Ground
    owner: Owner
    registry: Registry
    claim: Lease
    members: Seen[tuple[Registration, ...]]
    nodes: Seen[tuple[Registration, ...]]
    claims: Seen[dict[str, str]]
    documents: Seen[dict[str, bytes]]

    async def changed_nothing(self) -> None:
        """Everything is there for somebody who asks now, and stays; writing works; no watcher was ever shown anything else."""
        fresh = await self.ground.open()
        await until(fresh.watch(GROUP), lambda rows: rows == self.members.views[0])
        await until(fresh.watch(NODE), lambda rows: rows == self.nodes.views[0])
        await until(fresh.watch_claims("m/"), lambda claims: claims == self.claims.views[0])
        await until(fresh.watch_documents("desired/"), lambda found: found == self.documents.views[0])
        await self.registry.write("later", b"1")
        assert await fresh.read("later") == b"1"
        await asyncio.sleep(SETTLED_S)
        assert await fresh.claim(CLAIM, "thief") is None
        assert await fresh.claim("m/r/1", "thief") is None
        for seen in (self.members, self.nodes, self.claims, self.documents):
            assert seen.views == seen.views[:1]


@asynccontextmanager
async def scene(agent: Agent) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        ground = ground_of(agent, stack)
        registry, watcher = await ground.open(), await ground.open()
        owner = await stack.enter_async_context(running_owner(ground.url))
        await registry.register(Registration(NODE, "n", "127.0.0.1:9", {"zone": "a"}))
        claim = await registry.claim("m/r/1", "n")
        assert claim is not None
        await registry.write("desired/m", b"wanted")
        async with (
            seeing(watcher.watch(GROUP)) as members, seeing(watcher.watch(NODE)) as nodes,
            seeing(watcher.watch_claims("m/")) as claims, seeing(watcher.watch_documents("desired/")) as documents,
        ):
            assert len(members.views[0]) == len(nodes.views[0]) == len(documents.views[0]) == 1 and len(claims.views[0]) == 2
            yield Scene(ground, owner, registry, claim, members, nodes, claims, documents)


async def _hangs(folder: Path, for_s: float = 7.0) -> None:
    """By default longer than the TTL of a registration, and than the registry waits before it takes an agent for lost."""
    async with dev_agent(folder) as agent, scene(agent) as stage:
        agent.stop()
        await asyncio.sleep(for_s)
        agent.cont()
        await stage.changed_nothing()


async def _forgets(folder: Path) -> None:
    async with dev_agent(folder) as agent, scene(agent) as stage:
        await agent.kill()
        await asyncio.sleep(1.5)
        await agent.restart()
        await stage.changed_nothing()


async def _restarts(folder: Path) -> None:
    async with dev_agent(folder, persistent=True) as agent, scene(agent) as stage:
        await agent.restart()
        await stage.changed_nothing()


async def _loses_data(folder: Path) -> None:
    async with dev_agent(folder, persistent=True) as agent, scene(agent) as stage:
        await agent.restart(keep_data=False)
        await stage.changed_nothing()


@pytest.mark.skipif(not os.environ.get("TENSORWAY_LONG_OUTAGE"), reason="the long form: make consul-outage")
@pytest.mark.timeout(240)
async def test_sixty_seconds_without_consul(tmp_path: Path) -> None:
    await _hangs(tmp_path / "hangs", 60.0)


async def _who_dies_meanwhile_is_gone_at_last(folder: Path) -> None:
    async with dev_agent(folder) as agent, scene(agent) as stage:
        await agent.kill()
        await stage.owner.kill()
        await agent.restart()
        await stage.members.until(lambda rows: rows == ())
        await stage.claims.until(lambda claims: claims == {"m/r/1": "n"})
        assert stage.nodes.views == stage.nodes.views[:1]
        assert await (await stage.ground.open()).claim(CLAIM, "heir") is not None


async def _deletions_stand(folder: Path) -> None:
    async with dev_agent(folder) as agent, AsyncExitStack() as stack:
        ground = ground_of(agent, stack)
        writer, operator = await ground.open(), await ground.open()
        for key in ("mine", "deleted", "changed", "withdrawn"):
            await writer.write(f"desired/{key}", b"old")
        await until(writer.watch_documents("desired/"), lambda found: len(found) == 4)
        await operator.delete("desired/deleted")
        await operator.write("desired/changed", b"new")
        await writer.delete("desired/withdrawn")
        kept = {"desired/mine": b"old", "desired/changed": b"new"}
        await until(writer.watch_documents("desired/"), lambda found: found == kept)
        await asyncio.sleep(1.0)  # the writer asks for the mesh's name before it believes in a deletion
        await agent.restart()
        await until((await ground.open()).watch_documents("desired/"), lambda found: found == kept)
        await asyncio.sleep(SETTLED_S)
        fresh = await ground.open()
        assert await until(fresh.watch_documents("desired/"), bool) == kept


async def _operations_say_where_and_why_they_failed(folder: Path) -> None:
    async with dev_agent(folder) as agent, AsyncExitStack() as stack:
        registry = await ground_of(agent, stack).open()
        await agent.kill()
        began = time.monotonic()
        attempts = (
            registry.write("k", b"v"), registry.read("k"), registry.claim("k", "me"), registry.registrations(NODE),
            registry.register(Registration(NODE, "n", "a:1")), registry.create("k", b"v"), registry.delete("k"),
        )
        for outcome in await asyncio.gather(*attempts, return_exceptions=True):
            assert isinstance(outcome, Unavailable), outcome
            assert agent.http in str(outcome) and "cannot be reached" in str(outcome)
        assert time.monotonic() - began < PATIENCE_S
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(until(registry.watch(NODE), lambda rows: True))
            await asyncio.sleep(1)
            assert not first.done(), "what is not known is not said to be nothing"
            await agent.restart()
            assert await first == ()
        await registry.write("k", b"v")


async def _a_stopped_owner_loses_what_it_holds(ground: Ground) -> None:
    registry = await ground.open()
    async with running_owner(ground.url) as owner:
        owner.stop()
        await until(registry.watch(GROUP), lambda rows: rows == ())
        await until(registry.watch_claims("m/"), lambda claims: claims == {})
        assert await registry.claim(CLAIM, "heir") is not None
        owner.cont()
        assert await owner.line() == "lost"
        assert await until(registry.watch(GROUP), bool) == (owner.registration,)
        assert await until(registry.watch_claims("m/"), bool) == {CLAIM: "heir"}


async def _a_stopped_owner_takes_back_what_nobody_wanted(ground: Ground) -> None:
    registry = await ground.open()
    async with running_owner(ground.url) as owner:
        owner.stop()
        await until(registry.watch_claims("m/"), lambda claims: claims == {})
        owner.cont()
        assert await until(registry.watch_claims("m/"), bool) == {CLAIM: "owner"}
        assert await until(registry.watch(GROUP), bool) == (owner.registration,)
        assert await registry.claim(CLAIM, "thief") is None


async def _an_id_that_was_taken_is_not_fought_for(ground: Ground) -> None:
    registry = await ground.open()
    async with running_owner(ground.url) as owner:
        owner.stop()
        successor = await registry.register(Registration(GROUP, ID, "127.0.0.1:10"))
        owner.cont()
        for _ in range(4):
            await asyncio.sleep(1)
            assert [row.endpoint for row in await registry.registrations(GROUP)] == ["127.0.0.1:10"]
        await successor.release()
        assert await until(registry.watch(GROUP), bool) == (owner.registration,)


async def _a_registration_that_somebody_removes_is_made_again(ground: Ground, agent: Agent) -> None:
    registry = await ground.open()
    async with running_owner(ground.url) as owner:
        services = await agent.call("GET", "/v1/agent/services")
        (id_,) = (id_ for id_, service in services.items() if service["Meta"].get("tensorway-endpoint") == owner.registration.endpoint)
        await agent.call("PUT", f"/v1/agent/service/deregister/{id_}")
        assert await until(registry.watch(GROUP), bool) == (owner.registration,)
        assert await until(registry.watch_claims("m/"), bool) == {CLAIM: "owner"}


async def _servers_die_one_after_another(folder: Path) -> None:
    """Owners use the agent of server 1. It dies (it may be the leader); they go on at server 2. It comes back with a row that nobody means
    any more. Then a second one dies too, and there is no quorum."""
    async with cluster(folder, 3) as made, AsyncExitStack() as stack:
        first, second, third = made.servers
        url = made.registry_url("mesh")
        ground = Ground(url, f"{url}?check=ttl", stack)
        watcher = await Ground("", third.registry_url("mesh"), stack).open()
        writer = await ground.open()
        await writer.write("k", b"1")
        owner = await stack.enter_async_context(running_owner(ground.url))
        async with seeing(watcher.watch(GROUP)) as members, seeing(watcher.watch_claims("")) as claims:
            await first.kill()
            await writer.write("k", b"2")
            assert await watcher.read("k") == b"2"
            await _until_dead(first, seen_by=second)
            assert members.views == [(owner.registration,)]
            assert claims.views == [{CLAIM: "owner"}]
            assert len(await second.call("GET", "/v1/agent/services")) == 1
            await first.start()
            await made.wait_ready()
            async with asyncio.timeout(PATIENCE_S):
                while await first.call("GET", "/v1/agent/services"):
                    await asyncio.sleep(0.1)
            await first.kill()
            third.stop()
            with pytest.raises(Unavailable, match=r"cannot at present|did not answer|cannot be reached"):
                await writer.write("k", b"3")
            third.cont()
            await writer.write("k", b"4")
            assert members.views == [(owner.registration,)]
            owner.process.terminate()
            await members.until(lambda rows: rows == ())
            await claims.until(lambda held: held == {})


async def _until_dead(agent: Agent, seen_by: Agent) -> None:
    """Returns once the servers take `agent` for dead, and with it all that is registered there."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            checks = await seen_by.call("GET", f"/v1/health/node/{agent.name}")
            if any(check["CheckID"] == "serfHealth" and check["Status"] == "critical" for check in checks):
                return
            await asyncio.sleep(0.2)


async def test_a_claim_goes_from_session_to_session_without_a_gap(shared_agent: Agent, stack: AsyncExitStack) -> None:
    """First it hangs on its age alone, then on the liveness of a registration, and again on its age when that is released."""
    ground = ground_of(shared_agent, stack)
    registry = await ground.open()
    assert await registry.claim("early", "me") is not None

    async def look() -> tuple[int, str]:
        (entry,) = await shared_agent.call("GET", f"/v1/kv/{ground.url.rpartition('/')[2]}/claims/early")
        return entry["CreateIndex"], entry["Session"]

    created, first = await look()
    registered = await registry.register(Registration(NODE, "n", "a:1"))
    async with asyncio.timeout(PATIENCE_S):
        while (await look())[1] == first:
            await asyncio.sleep(0.05)
    second = (await look())[1]
    (session,) = await shared_agent.call("GET", f"/v1/session/info/{second}")
    assert any(check.endswith("-node-n:liveness") for check in session["Checks"])
    await registered.release()
    again, third = await look()
    assert third != second
    assert again == created, "the key was never deleted"


@pytest.mark.timeout(240)
async def test_nothing_that_lives_is_shown_as_gone_and_the_view_heals(tmp_path: Path, shared_agent: Agent, stack: AsyncExitStack) -> None:
    await together(
        _hangs(tmp_path / "hangs"), _forgets(tmp_path / "forgets"), _restarts(tmp_path / "restarts"), _loses_data(tmp_path / "loses"),
        _who_dies_meanwhile_is_gone_at_last(tmp_path / "dies"), _deletions_stand(tmp_path / "deletions"),
        _operations_say_where_and_why_they_failed(tmp_path / "operations"), _servers_die_one_after_another(tmp_path / "servers"),
        _a_stopped_owner_loses_what_it_holds(ground_of(shared_agent, stack)),
        _a_stopped_owner_takes_back_what_nobody_wanted(ground_of(shared_agent, stack)),
        _an_id_that_was_taken_is_not_fought_for(ground_of(shared_agent, stack)),
        _a_registration_that_somebody_removes_is_made_again(ground_of(shared_agent, stack), shared_agent),
    )

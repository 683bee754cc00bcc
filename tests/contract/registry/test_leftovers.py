"""What the dead have left behind is deleted, and nothing else: both registries."""

from __future__ import annotations

import asyncio

from tensorway.registry.leftovers import Leftovers
from tensorway.registry.port import NODE, NODES, Registration, Registry
from tests.contract.registry.conftest import Ground
from tests.contract.registry.views import PATIENCE_S, until


async def test_a_document_goes_once_its_owner_has_been_gone_for_a_while(ground: Ground, registry: Registry) -> None:
    owner = await ground.open()
    lease = await owner.register(Registration(NODE, "dies", "a:1"))
    await owner.register(Registration(NODE, "lives", "a:2"))
    for id in ("dies", "lives", "was/never"):
        await owner.write(f"{NODES}{id}", b"{}")
    await owner.write("other/dies", b"{}")
    await until(registry.watch_documents(NODES), lambda documents: len(documents) == 3)
    sweeping = asyncio.ensure_future(Leftovers(registry, NODES, NODE, gone_s=0.5).run())
    try:
        async with asyncio.timeout(PATIENCE_S):
            await until(registry.watch_documents(NODES), lambda documents: set(documents) == {f"{NODES}dies", f"{NODES}lives"})
            await lease.release()
            await until(registry.watch_documents(NODES), lambda documents: set(documents) == {f"{NODES}lives"})
            # Who comes back within the time keeps it.
            await owner.write(f"{NODES}dies", b"{}")
            await owner.register(Registration(NODE, "dies", "a:1"))
            await asyncio.sleep(1.5)
        assert await registry.read(f"{NODES}dies") == b"{}"
        assert await registry.read("other/dies") == b"{}"
    finally:
        sweeping.cancel()
        await asyncio.wait((sweeping,))

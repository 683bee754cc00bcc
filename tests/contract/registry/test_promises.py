"""What every registry promises, whichever adapter keeps it: real owner processes, real kills, real Consul."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from tensorway.errors import FailedPrecondition, TensorwayError
from tensorway.registry.amending import amend
from tensorway.registry.port import GROUP, Registration, Registry
from tests.contract.registry.conftest import Ground
from tests.contract.registry.owner import CLAIM, ID, running_owner
from tests.contract.registry.views import PATIENCE_S, until


async def test_a_killed_owner_loses_registration_and_claim(ground: Ground, registry: Registry) -> None:
    async with running_owner(ground.url) as owner:
        assert await registry.claim(CLAIM, "me") is None
        seen: list[tuple[Registration, ...]] = []
        await asyncio.sleep(1.5)  # its claim hangs on its registration by now
        began = time.monotonic()
        async with asyncio.timeout(PATIENCE_S):
            async for registrations in registry.watch(GROUP):
                seen.append(registrations)
                if not registrations:
                    break
                await owner.kill()
        assert seen == [(owner.registration,), ()]
        await until(registry.watch_claims("m/"), lambda claims: not claims)
        assert time.monotonic() - began < 9, "it takes about a second; a claim that only its age ends takes ten or more"
        assert await registry.claim(CLAIM, "me") is not None


async def test_an_owner_that_ends_in_order_leaves_nothing(ground: Ground, registry: Registry) -> None:
    async with running_owner(ground.url) as owner:
        owner.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            assert await owner.process.wait() == 0
        assert await registry.registrations(GROUP) == ()
        assert await registry.claim(CLAIM, "me") is not None


async def test_the_id_of_a_living_process_is_refused_and_that_of_a_dead_one_is_free(ground: Ground, registry: Registry) -> None:
    async with running_owner(ground.url) as owner:
        with pytest.raises(FailedPrecondition, match="already registered"):
            await registry.register(Registration(GROUP, ID, "127.0.0.1:9"))
        assert await registry.registrations(GROUP) == (owner.registration,)
        await owner.kill()
        await registry.register(Registration(GROUP, ID, "127.0.0.1:10"))
        assert [row.endpoint for row in await registry.registrations(GROUP)] == ["127.0.0.1:10"]


async def test_an_id_cannot_be_registered_twice(registry: Registry) -> None:
    lease = await registry.register(Registration("node", "n", "a:1"))
    with pytest.raises(FailedPrecondition, match="already registered"):
        await registry.register(Registration("node", "n", "a:2"))
    await lease.release()
    await lease.release()
    await registry.register(Registration("node", "n", "a:2"))
    assert [row.endpoint for row in await registry.registrations("node")] == ["a:2"]


async def test_ids_are_unique_within_their_kind_only(registry: Registry) -> None:
    await registry.register(Registration("node", "same", "a:1"))
    await registry.register(Registration("gateway", "same", "unix:/run/gateway.sock"))
    assert [row.endpoint for row in await registry.registrations("node")] == ["a:1"]
    assert [row.endpoint for row in await registry.registrations("gateway")] == ["unix:/run/gateway.sock"]


async def test_registrations_are_whole_and_in_order(registry: Registry) -> None:
    odd = Registration("node", "räck 7/n.2?x=%41#y", "[::1]:80", {"model": "großes Modell", "empty": "", "long": "x" * 512})
    others = [Registration("node", id_, "a:1") for id_ in ("b", "a", "..", "B")]
    for registration in (odd, *others):
        await registry.register(registration)
    found = await registry.registrations("node")
    assert [row.id for row in found] == sorted(row.id for row in (odd, *others))
    assert odd in found


async def test_watchers_see_updates_and_releases_in_order(ground: Ground, registry: Registry) -> None:
    lease = await registry.register(Registration("node", "n", "a:1", {"state": "one"}))
    states: list[str] = []
    async with asyncio.timeout(PATIENCE_S):
        async for registrations in (await ground.open()).watch("node"):
            states.append(registrations[0].metadata["state"] if registrations else "gone")
            if states[-1] == "one":
                await lease.update(Registration("node", "n", "a:1", {"state": "two"}))
            elif states[-1] == "two":
                await lease.release()
            else:
                break
    assert states == ["one", "two", "gone"]


async def test_an_update_never_shows_half_a_row(registry: Registry) -> None:
    lease = await registry.register(Registration("node", "n", "a:1", {"text": "x"}))
    for number in range(60):
        length = 1 + number * 7919 % 500
        update = asyncio.ensure_future(lease.update(Registration("node", "n", "a:1", {"text": "y" * length})))
        for row in await registry.registrations("node"):
            assert set(row.metadata["text"]) <= {"x", "y"}
            assert len(set(row.metadata["text"])) == 1
        await update
        assert [len(row.metadata["text"]) for row in await registry.registrations("node")] == [length]


async def test_everybody_who_watches_sees_everything_that_stays(ground: Ground, registry: Registry) -> None:
    async def follow(reader: Registry) -> set[str]:
        return {row.id for row in await until(reader.watch("node"), lambda rows: len(rows) == 12)}

    other = await ground.open()
    async with asyncio.TaskGroup() as tasks:
        followers = [tasks.create_task(follow(reader)) for reader in (registry, registry, other)]
        for number in range(12):
            await registry.register(Registration("node", f"n{number}", "a:1"))
    expected = {f"n{number}" for number in range(12)}
    assert [follower.result() for follower in followers] == [expected] * 3


async def test_a_watch_that_was_left_can_be_begun_again(registry: Registry) -> None:
    lease = await registry.register(Registration("node", "n", "a:1"))
    assert len(await until(registry.watch("node"), bool)) == 1
    await lease.release()
    assert await until(registry.watch("node"), lambda rows: True) == ()


async def test_documents(registry: Registry) -> None:
    key = "revisions/model with spaces/…/abc"
    assert await registry.read(key) is None
    assert await registry.create(key, b"1")
    assert not await registry.create(key, b"2")
    await registry.write(key, b"3")
    await registry.write("other/x", b"unseen")
    async with asyncio.timeout(PATIENCE_S):
        async for documents in registry.watch_documents("revisions/"):
            if not documents:
                break
            assert documents == {key: b"3"}
            await registry.delete(key)
    await registry.delete(key)


async def test_a_document_has_any_key_and_any_bytes(registry: Registry) -> None:
    value = bytes(range(256))
    for key in ("a", "/a", "a//b", "a/", "a/../b", "a/./b", "a/%2F/b", "a?b#c&d=e", "übel/…", "a b+c", ".."):
        await registry.write(key, b"")
        assert await registry.read(key) == b""
        await registry.write(key, value)
        assert await registry.read(key) == value
        assert await until(registry.watch_documents(key), bool) == {key: value}
        assert await until(registry.watch_documents(""), bool) == {key: value}
        await registry.delete(key)
        assert await registry.read(key) is None


async def test_a_prefix_is_a_prefix_of_keys_not_a_folder(registry: Registry) -> None:
    for key in ("models/a", "models/ab", "models/b", "mod"):
        await registry.write(key, key.encode())
    assert set(await until(registry.watch_documents("models/a"), bool)) == {"models/a", "models/ab"}
    assert len(await until(registry.watch_documents("mod"), bool)) == 4


async def test_a_value_may_have_half_a_mebibyte_and_no_more(registry: Registry) -> None:
    value = bytes(512 * 1024)
    await registry.write("k", value)
    assert await registry.read("k") == value
    for put in (registry.write, registry.create, lambda key, value: registry.replace(key, b"", value)):
        with pytest.raises(FailedPrecondition, match="bytes, more than"):
            await put("k2", value + b"x")
    assert await registry.read("k2") is None


async def test_one_of_many_creates_a_document(ground: Ground) -> None:
    registries = [await ground.open() for _ in range(8)]
    created = await asyncio.gather(*(each.create("k", str(number).encode()) for number, each in enumerate(registries)))
    assert sum(created) == 1
    assert await registries[0].read("k") == str(created.index(True)).encode()


async def test_a_document_is_replaced_where_it_is_what_one_thinks(ground: Ground, registry: Registry) -> None:
    key = "desired/model with spaces/…"
    assert not await registry.replace(key, b"", b"1")
    assert await registry.read(key) is None
    assert await registry.create(key, b"")
    assert not await registry.replace(key, b"1", b"2")
    assert await registry.replace(key, b"", b"1")
    assert not await registry.replace(key, b"", b"2")
    assert await registry.replace(key, b"1", b"1")
    assert await (await ground.open()).replace(key, b"1", b"3")
    assert await until(registry.watch_documents("desired/"), lambda documents: documents.get(key) == b"3") == {key: b"3"}


async def test_one_of_many_replaces_a_document(ground: Ground) -> None:
    registries = [await ground.open() for _ in range(8)]
    await registries[0].write("k", b"before")
    replaced = await asyncio.gather(*(each.replace("k", b"before", str(number).encode()) for number, each in enumerate(registries)))
    assert sum(replaced) == 1
    assert await registries[0].read("k") == str(replaced.index(True)).encode()


async def test_no_change_of_many_is_lost(ground: Ground) -> None:
    registries = [await ground.open() for _ in range(4)]

    async def count(registry: Registry) -> None:
        for _ in range(5):
            await amend(registry, "k", lambda document: str(int(document or b"0") + 1).encode())

    await asyncio.gather(*map(count, registries))
    assert await registries[0].read("k") == b"20"
    assert await amend(registries[0], "k", lambda document: None) == b"20"


async def test_a_claim_names_its_holder_to_all(ground: Ground, registry: Registry) -> None:
    lease = await registry.claim("m/r/0", "first")
    assert lease is not None
    assert await registry.claim("m/r/0", "second") is None
    assert await (await ground.open()).claim("m/r/0", "third") is None
    await registry.claim("n/r/0", "unseen")
    async with asyncio.timeout(PATIENCE_S):
        async for claims in registry.watch_claims("m/"):
            if not claims:
                break
            assert claims == {"m/r/0": "first"}
            await lease.release()
    again = await registry.claim("m/r/0", "second")
    assert again is not None
    await lease.release()
    assert await until(registry.watch_claims("m/"), bool) == {"m/r/0": "second"}


async def test_many_contenders_one_holder(ground: Ground) -> None:
    registries = [await ground.open() for _ in range(20)]
    leases = await asyncio.gather(*(each.claim("k", str(number)) for number, each in enumerate(registries)))
    assert sum(lease is not None for lease in leases) == 1


async def test_many_contenders_one_registration(ground: Ground) -> None:
    registries = [await ground.open() for _ in range(6)]
    outcomes = await asyncio.gather(
        *(each.register(Registration("node", "n", f"a:{number}")) for number, each in enumerate(registries)), return_exceptions=True
    )
    refused = [outcome for outcome in outcomes if isinstance(outcome, TensorwayError)]
    assert len(refused) == 5
    assert all(isinstance(outcome, FailedPrecondition) for outcome in refused), refused
    (row,) = await registries[0].registrations("node")
    assert not isinstance(outcomes[int(row.endpoint.partition(":")[2])], Exception)


async def test_what_is_held_is_not_lost(registry: Registry) -> None:
    claim = await registry.claim("k", "me")
    registered = await registry.register(Registration("node", "n", "a:1"))
    assert claim is not None
    for lease in (claim, registered):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await lease.wait_lost()


async def test_releasing_a_registration_keeps_the_claims(ground: Ground, registry: Registry) -> None:
    early = await registry.claim("early", "me")
    registered = await registry.register(Registration("node", "n", "a:1"))
    late = await registry.claim("late", "me")
    assert early is not None and late is not None
    await registered.release()
    other = await ground.open()
    assert await other.registrations("node") == ()
    assert await other.claim("early", "you") is None
    assert await other.claim("late", "you") is None
    await late.release()
    assert await other.claim("late", "you") is not None


async def test_closing_releases_everything(ground: Ground) -> None:
    first = await ground.open()
    await first.register(Registration("node", "n", "a:1"))
    lease = await first.claim("k", "me")
    await first.close()
    second = await ground.open()
    assert await second.registrations("node") == ()
    assert await second.claim("k", "you") is not None
    assert lease is not None
    await lease.release()
    await first.close()


async def test_closing_ends_no_other_owner(ground: Ground, registry: Registry) -> None:
    other = await ground.open()
    await other.register(Registration("node", "theirs", "a:1"))
    await registry.register(Registration("node", "mine", "a:1"))
    await registry.close()
    assert [row.id for row in await other.registrations("node")] == ["theirs"]

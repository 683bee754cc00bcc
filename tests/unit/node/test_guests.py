"""Ranks that one node hosts for another's group: real ranks, real gRPC, both nodes' sides."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from supervised import Supervised, chain, gone, supervised

from tensorway.errors import FailedPrecondition, InvalidRequest, NotFound, TensorwayError, Unavailable
from tensorway.model_directory import load_directory
from tensorway.transport import AsyncChannel, create_server
from tensorway.transport.port import Server, ServerOptions
from tensorway.v1 import node_pb2
from tensorway_worker.devices import DevicePool
from tensorway_worker.guest_host import GuestHost
from tensorway_worker.guest_wire import RUN_RANKS, orders_message
from tensorway_worker.orders import BlockOrders
from tensorway_worker.placement import Partner
from tensorway_worker.settings import NodeSettings

SPREAD = "{pipeline: 2, nodes: 2}"


@dataclass
class Host:
    """A node that hosts guests."""

    guests: GuestHost
    server: Server
    partner: Partner


@asynccontextmanager
async def host(model: Path, transport: str = "completion-queue", **settings: object) -> AsyncIterator[Host]:
    directory = load_directory(model)
    found = NodeSettings(**{"rank_interface": "lo", "rank_listen": "127.0.0.1:0", **settings})  # type: ignore[arg-type]
    guests = GuestHost("node-2", {directory.spec.revision: directory}, found, DevicePool(()))
    server = create_server(ServerOptions("127.0.0.1:0", transport))
    guests.attach(server)
    endpoint = await server.start()
    try:
        yield Host(guests, server, Partner("node-2", endpoint))
    finally:
        await server.stop(0.0)


@asynccontextmanager
async def spread(folder: Path, code: str = "", **settings: object) -> AsyncIterator[tuple[Supervised, Host]]:
    """A group whose second rank lives on another node. The host outlives the group."""
    model = chain(folder, SPREAD, code)
    async with host(model) as guest, supervised(model, folder, (guest.partner,), rank_interface="lo", **settings) as group:
        yield group, guest


def pids_of(group: Supervised) -> tuple[int, ...]:
    return tuple(rank.pid for rank in group.report.ranks)


@pytest.mark.parametrize("transport", ["completion-queue", "aio"])
async def test_two_nodes_form_one_group_and_its_end_ends_both_blocks(tmp_path: Path, transport: str) -> None:
    model = chain(tmp_path, SPREAD)
    async with host(model, transport) as guest:
        async with supervised(model, tmp_path, (guest.partner,), rank_interface="lo") as group:
            report = await group.ready()
            assert [(rank.rank, rank.node, rank.state) for rank in report.ranks] == [(0, "node-1", "ready"), (1, "node-2", "ready")]
            pids = pids_of(group)
            environment = Path(f"/proc/{pids[1]}/environ").read_bytes().split(b"\0")
            assert {b"RANK=1", b"LOCAL_RANK=0", b"WORLD_SIZE=2", b"LOCAL_WORLD_SIZE=1", b"GLOO_SOCKET_IFNAME=lo"} <= set(environment)
        await gone(*pids)
        assert guest.guests._empty.is_set()


async def test_a_guest_that_is_killed_is_named_and_the_group_forms_anew(tmp_path: Path) -> None:
    async with spread(tmp_path) as (group, _):
        await group.ready()
        before = pids_of(group)
        reasons: list[str] = []
        group.supervisor.on_change = lambda: (reasons.append(group.report.reason), group.on_change())[0]
        os.kill(before[1], signal.SIGKILL)
        await group.ready(2)
        assert next(filter(None, reasons)).startswith("epoch 1: rank 1 on node-2 was killed by SIGKILL")
        await gone(*before)


async def test_a_guest_that_cannot_start_says_why_at_the_owner(tmp_path: Path) -> None:
    async with spread(tmp_path, "raise ValueError('no such file')") as (group, _):
        reason = await group.failed()
        assert reason.startswith("epoch 1: rank 1 on node-2: load raised ValueError: no such file")
        assert "about to misbehave" in reason


async def test_a_host_that_is_lost_ends_the_epoch(tmp_path: Path) -> None:
    async with spread(tmp_path) as (group, guest):
        await group.ready()
        before = pids_of(group)
        await guest.server.stop(0.0)
        reason = await group.failed()
        assert "node node-2, which" in reason
        await gone(*before)


async def test_a_host_that_drains_gives_its_guests_up(tmp_path: Path) -> None:
    async with spread(tmp_path) as (group, guest):
        await group.ready()
        before = pids_of(group)
        await guest.guests.drain()
        await gone(before[1])
        assert "is draining" in await group.failed()
        await gone(*before)


def orders_for(model: Path, **changes: object) -> BlockOrders:
    directory = load_directory(model)
    orders = BlockOrders(
        model=directory.yaml.name, revision=directory.spec.revision, group="g", epoch=1, owner="node-1", first_rank=1, num_ranks=1,
        pipeline=2, tensor=1, is_spread=True, secret="0" * 64, verify=False, heartbeat_s=0.1, hung_after_s=1.0, grace_s=1.0,
    )
    return replace(orders, **changes)  # type: ignore[arg-type]


async def outcome(endpoint: str, *messages: bytes) -> tuple[list[int], TensorwayError | None]:
    """The pids that were started, and the error that the stream ended with."""
    channel = AsyncChannel(endpoint)
    stream = channel.stream(RUN_RANKS)
    pids: list[int] = []
    try:
        for message in messages:
            await stream.write(message)
        while (reply := await stream.read()) is not None:
            pids += [rank.pid for rank in node_pb2.RunRanksResponse.FromString(reply).started.ranks]
    except TensorwayError as error:
        return pids, error
    finally:
        await stream.cancel()
        await channel.close()
    return pids, None


async def test_an_owner_that_falls_silent_loses_its_ranks(tmp_path: Path) -> None:
    model = chain(tmp_path, SPREAD)
    async with host(model) as guest:
        pids, error = await outcome(guest.partner.endpoint, orders_message(orders_for(model)).SerializeToString())
        assert isinstance(error, Unavailable)
        assert "silent for 1.0 s" in str(error)
        await gone(*pids)
        assert len(pids) == 1


async def test_an_owner_that_hangs_up_loses_its_ranks_at_once(tmp_path: Path) -> None:
    model = chain(tmp_path, SPREAD)
    async with host(model) as guest:
        channel = AsyncChannel(guest.partner.endpoint)
        stream = channel.stream(RUN_RANKS)
        await stream.write(orders_message(orders_for(model, hung_after_s=60.0)).SerializeToString())
        started = node_pb2.RunRanksResponse.FromString(await stream.read() or b"").started
        await channel.close()
        await stream.cancel()
        async with asyncio.timeout(2.0):
            await gone(*(rank.pid for rank in started.ranks))


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"revision": "f" * 64}, NotFound, "does not offer revision ffffffffffff"),
        ({"first_rank": 0}, InvalidRequest, "that its owner may give away"),
        ({"num_ranks": 2}, InvalidRequest, "no block of a group of 2"),
        ({"pipeline": 4, "num_ranks": 3}, InvalidRequest, "is cut 2 x 1 over 2 nodes"),
        ({"secret": "short"}, InvalidRequest, "64 hex digits"),
        ({"hung_after_s": 0.0}, InvalidRequest, "above 0"),
    ],
)
async def test_orders_that_are_wrong_start_nothing(
    tmp_path: Path, changes: dict[str, object], kind: type[TensorwayError], words: str
) -> None:
    model = chain(tmp_path, SPREAD)
    async with host(model) as guest:
        pids, error = await outcome(guest.partner.endpoint, orders_message(orders_for(model, **changes)).SerializeToString())
        assert isinstance(error, kind)
        assert words in str(error)
        assert not pids


async def test_a_node_without_a_private_interface_hosts_nobody(tmp_path: Path) -> None:
    model = chain(tmp_path, SPREAD)
    async with host(model, rank_interface="") as guest:
        pids, error = await outcome(guest.partner.endpoint, orders_message(orders_for(model)).SerializeToString())
        assert isinstance(error, FailedPrecondition)
        assert "hosts no ranks of other nodes" in str(error)
        assert not pids


@pytest.mark.parametrize("first", [b"\xff\xff", b"", node_pb2.RunRanksRequest(beat=node_pb2.OwnerBeat()).SerializeToString()])
async def test_what_is_no_order_is_refused(tmp_path: Path, first: bytes) -> None:
    async with host(chain(tmp_path, SPREAD)) as guest:
        _, error = await outcome(guest.partner.endpoint, first)
        assert isinstance(error, InvalidRequest)

"""Ranks that one node hosts for another's group: real ranks, real gRPC, both nodes' sides."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from supervised import Supervised, chain, gone, supervised

from tensorway.deadline import Deadline
from tensorway.errors import FailedPrecondition, InvalidRequest, NotFound, PermissionDenied, TensorwayError, Unavailable
from tensorway.model_directory import load_directory
from tensorway.telemetry.trace_context import new_trace
from tensorway.tensors import DataType
from tensorway.transport import AsyncChannel, create_link_client, create_server
from tensorway.transport.port import Call, Server, ServerOptions
from tensorway.v1 import link_pb2, node_pb2
from tensorway_worker.devices import DevicePool
from tensorway_worker.group_report import GroupReport
from tensorway_worker.guest_host import GuestHost
from tensorway_worker.guest_wire import RUN_RANKS, orders_message
from tensorway_worker.metrics import NodeCollector
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
    traces = {name: value for name, value in settings.items() if name == "trace_endpoint"}
    async with host(model, **traces) as guest, supervised(model, folder, (guest.partner,), rank_interface="lo", **settings) as group:
        yield group, guest


def pids_of(group: Supervised) -> tuple[int, ...]:
    return tuple(rank.pid for rank in group.report.ranks)


@dataclass
class SpanReceiver:
    """Refuses spans while `is_shut`."""

    is_shut: bool = True

    async def export(self, message: bytes, call: Call) -> bytes:
        if self.is_shut:
            raise PermissionDenied("no spans today")
        return b""


@asynccontextmanager
async def span_receiver() -> AsyncIterator[tuple[SpanReceiver, str]]:
    """A receiver of OTLP/gRPC, and its endpoint."""
    receiver, server = SpanReceiver(), create_server(ServerOptions("127.0.0.1:0"))
    server.add_unary("/opentelemetry.proto.collector.trace.v1.TraceService/Export", receiver.export)
    endpoint = await server.start()
    try:
        yield receiver, endpoint
    finally:
        await server.stop(0.0)


async def ask_traced(report: GroupReport) -> None:
    """One sampled request, as an orchestrator sends it to the leader."""
    x = np.ones((1, 2), np.float32).tobytes()
    request = link_pb2.RequestHead(request_id="r", rows=1, traceparent=new_trace().to_wire())
    request.inputs.add(name="x", dtype=DataType.FP32, shape=[1, 2], num_bytes=len(x))  # type: ignore[arg-type]
    head = link_pb2.BatchHead(batch_id=1, epoch=report.epoch, requests=[request.SerializeToString()], remaining_us=[60_000_000])
    link = create_link_client(report.endpoint)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(link.run())
        await link.wait_connected(Deadline.after(30.0))
        reply = await link.call(head.SerializeToString(), (x,), Deadline.after(30.0))
        running.cancel()
    (result,) = link_pb2.BatchReplyHead.FromString(reply.head).results
    assert not result.HasField("error"), result.error


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


async def test_a_killed_guest_is_named_and_the_group_forms_anew_and_counts_its_spans_on(tmp_path: Path) -> None:
    async with span_receiver() as (receiver, endpoint), spread(tmp_path, trace_endpoint=endpoint) as (group, _):
        registry = CollectorRegistry()
        NodeCollector(lambda: (group.report,), 0, registry)

        def counted(outcome: str) -> list[float | None]:
            name, labels = "tensorway_rank_trace_spans_total", {"model": "chain", "group": "chain.0@node-1", "outcome": outcome}
            return [registry.get_sample_value(name, {**labels, "rank": rank}) for rank in ("0", "1")]

        async def until_counted(outcome: str) -> None:
            # The step, and each rank's part of it.
            async with asyncio.timeout(60):
                while counted(outcome) != [2, 1]:
                    await asyncio.sleep(0.01)

        report = await group.ready()
        assert counted("dropped") == counted("exported") == [0, 0]
        await ask_traced(report)
        await until_counted("dropped")
        assert counted("exported") == [0, 0]
        receiver.is_shut = False
        before = pids_of(group)
        seen: list[tuple[str, list[float | None]]] = []
        group.supervisor.on_change = lambda: (seen.append((group.report.reason, counted("dropped"))), group.on_change())[1]
        os.kill(before[1], signal.SIGKILL)
        report = await group.ready(2)
        reason = next(reason for reason, _ in seen if reason)
        assert reason.startswith("epoch 1: rank 1 on node-2 was killed by SIGKILL")
        await gone(*before)
        await ask_traced(report)
        await until_counted("exported")
        # None has gone down or up: not while there were no ranks, nor afterwards.
        assert [*(numbers for _, numbers in seen), counted("dropped")] == [[2, 1]] * (len(seen) + 1)
        assert "past_spans" not in report.to_document()


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

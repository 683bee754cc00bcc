"""From what all nodes of a group agree on to the launch of each rank."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tensorway.model_directory import ModelDirectory
from tensorway_worker.rank.launch import RankLaunch
from tensorway_worker.settings import NodeSettings
from tensorway_worker.topology import threads_per_rank

#: Names of the interface variables of TensorPipe, gloo and NCCL.
_INTERFACE_VARIABLES: Final = ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_LOOPBACK: Final = "lo"


@dataclass(frozen=True, slots=True)
class BlockOrders:
    """What the node that owns a group orders for one block of its ranks. The rest is the hosting node's own to say."""

    model: str
    revision: str
    group: str
    epoch: int
    #: Id of the node that owns the group.
    owner: str
    first_rank: int
    num_ranks: int
    pipeline: int
    tensor: int
    #: Whether the group's ranks run on several nodes.
    is_spread: bool
    #: 64 hex digits.
    secret: str
    verify: bool
    heartbeat_s: float
    #: Silence after which the owner counts as lost.
    hung_after_s: float
    grace_s: float

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.num_ranks)


#: The launch and the environment of one rank.
Launch = tuple[RankLaunch, dict[str, str]]


def launches(
    orders: BlockOrders, directory: ModelDirectory, settings: NodeSettings, node: str, devices: Sequence[tuple[str, ...]]
) -> tuple[Launch, ...]:
    """Every rank of the block, in order. `devices` are the devices of each: one, or several in a `custom` group."""
    return tuple(
        (launch := _launch(orders, directory, settings, node, local_rank, own), _environment(launch, own, devices))
        for local_rank, own in enumerate(devices)
    )


def _launch(
    orders: BlockOrders, directory: ModelDirectory, settings: NodeSettings, node: str, local_rank: int, devices: tuple[str, ...]
) -> RankLaunch:
    is_cuda = devices[0] != "cpu"
    return RankLaunch(
        model_path=str(directory.path), model=orders.model, revision=orders.revision, group=orders.group, epoch=orders.epoch,
        rank=orders.first_rank + local_rank, world_size=orders.pipeline * orders.tensor,
        pipeline=orders.pipeline, tensor=orders.tensor, node=node, registry=settings.registry,
        listen=settings.rank_listen, advertise_host=settings.advertise_host, zone=settings.zone,
        threads=threads_per_rank(os.cpu_count() or 1, orders.num_ranks, directory.yaml.threads or settings.threads),
        # CUDA_VISIBLE_DEVICES puts its own device first.
        device="cuda:0" if is_cuda else "cpu", num_devices=len(devices) if is_cuda else 0,
        transport=settings.transport, max_message_bytes=settings.max_message_bytes,
        heartbeat_s=orders.heartbeat_s, grace_s=orders.grace_s, log_level=settings.log_level, log_format=settings.log_format,
        local_links=settings.local_links, secret=orders.secret,
        interface=settings.rank_interface if orders.is_spread else _LOOPBACK,
        tls=(settings.tls_cert, settings.tls_key, settings.tls_ca, settings.tls_domain),
        trace_endpoint=settings.trace_endpoint, trace_ca_file=settings.trace_ca_file, trace_headers_file=settings.trace_headers_file,
        trace_step_detail=settings.trace_step_detail, verify=orders.verify, local_rank=local_rank, local_world_size=orders.num_ranks,
    )


def _environment(launch: RankLaunch, own: tuple[str, ...], of_block: Sequence[tuple[str, ...]]) -> dict[str, str]:
    """torchrun's variables, the interface for the group's own traffic, and the devices that the rank may see.

    Its own device comes first and is its `cuda:0`. Its neighbours' devices follow: memory can go from device to device (CUDA IPC) only
    where both processes see both.
    """
    environment = {
        "RANK": str(launch.rank), "LOCAL_RANK": str(launch.local_rank), "WORLD_SIZE": str(launch.world_size),
        # Ranks meet through their node (`meeting.py`); a program that wants torchrun's own rendezvous finds no port here.
        "LOCAL_WORLD_SIZE": str(launch.local_world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
        "OMP_NUM_THREADS": str(launch.threads), "PYTHONUNBUFFERED": "1",
        **dict.fromkeys(_INTERFACE_VARIABLES, launch.interface),
    }
    if launch.num_devices:
        neighbours = [device for devices in of_block for device in devices]
        seen = dict.fromkeys((*own, *neighbours))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(device.removeprefix("cuda:") for device in seen)
    return environment

"""`NodeService.RunRanks` on the wire: orders as messages and back."""

from __future__ import annotations

from typing import Final

from google.protobuf.message import DecodeError

from tensorway.errors import InvalidRequest
from tensorway.v1 import node_pb2
from tensorway_worker.orders import BlockOrders

RUN_RANKS: Final = "/tensorway.v1.NodeService/RunRanks"
_SECRET_CHARS: Final = 64


def orders_message(orders: BlockOrders) -> node_pb2.RunRanksRequest:
    """The first message to a host."""
    return node_pb2.RunRanksRequest(
        orders=node_pb2.RankOrders(
            model=orders.model, revision=orders.revision, group=orders.group, epoch=orders.epoch, owner=orders.owner,
            first_rank=orders.first_rank, num_ranks=orders.num_ranks, pipeline=orders.pipeline, tensor=orders.tensor,
            secret=orders.secret, verify=orders.verify, heartbeat_s=orders.heartbeat_s, hung_after_s=orders.hung_after_s,
            grace_s=orders.grace_s,
        )
    )


def read_request(message: bytes) -> node_pb2.RunRanksRequest:
    """A message of the owner. Raises InvalidRequest where it is none."""
    try:
        return node_pb2.RunRanksRequest.FromString(message)
    except DecodeError as error:
        raise InvalidRequest("the message is no RunRanksRequest", field="request") from error


def read_orders(message: bytes | None) -> BlockOrders:
    """The first message of a stream. Raises InvalidRequest naming what is wrong with it."""
    request = read_request(message or b"")
    if request.WhichOneof("message") != "orders":
        raise InvalidRequest("the first message must be the orders", field="orders")
    found = request.orders
    world_size = found.pipeline * found.tensor
    if not 0 < found.first_rank < found.first_rank + found.num_ranks <= world_size:
        raise InvalidRequest(
            f"orders: ranks {found.first_rank} to {found.first_rank + found.num_ranks - 1} are no block of a group of {world_size} "
            "that its owner may give away", field="orders.first_rank",
        )
    if len(found.secret) != _SECRET_CHARS:
        raise InvalidRequest(f"orders.secret must have {_SECRET_CHARS} hex digits", field="orders.secret")
    if not (found.heartbeat_s > 0 and found.hung_after_s > 0 and found.grace_s >= 0):
        raise InvalidRequest("orders: heartbeat_s and hung_after_s must be above 0", field="orders.heartbeat_s")
    return BlockOrders(
        model=found.model, revision=found.revision, group=found.group, epoch=found.epoch, owner=found.owner,
        first_rank=found.first_rank, num_ranks=found.num_ranks, pipeline=found.pipeline, tensor=found.tensor,
        is_spread=True, secret=found.secret, verify=found.verify, heartbeat_s=found.heartbeat_s, hung_after_s=found.hung_after_s,
        grace_s=found.grace_s,
    )

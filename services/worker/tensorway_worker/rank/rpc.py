"""PyTorch RPC between the ranks of one group; the only module that imports `torch.distributed.rpc`.

RPC as it comes runs any pickled function from whoever can connect. Here it carries one kind of call: a line of text and tensors, for
the one handler that this rank has set. Nothing is ever unpickled: torch's pickler is replaced by the format below before RPC starts, and
a call without the epoch's secret is refused unread. Once all ranks have met, `group.py` closes the listening sockets, so that nobody
else can connect.

    byte 0     C call, R reply, E error
    C          64 hex digits: the epoch's secret
    the rest   the head, UTF-8; the tensors travel beside it, raw

Transports are `uv` (the default, `shm`, busy-polls) with the channels `cma` and `basic`; CUDA tensors go by `device_maps`.
"""

from __future__ import annotations

import hmac
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.distributed import autograd as dist_autograd
from torch.distributed import rpc
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import register_rendezvous_handler
from torch.distributed.rpc import api, internal

from tensorway_worker.rank.group_port import GroupLost, first_line

_TRANSPORTS: Final = ("uv",)
_CHANNELS: Final = ("cma", "basic")
#: Channels of CUDA tensors, best first, before those of the CPU.
_CUDA_CHANNELS: Final = ("cuda_ipc", "cuda_basic")
#: torch wants a bound for every call; a step may take long, and a dead peer is seen at once without it.
_CALL_TIMEOUT_S: Final = 3600.0
_SCHEME: Final = "tensorway"
_SECRET_CHARS: Final = 64

#: What a call or a reply carries.
Message = tuple[str, list[torch.Tensor]]
#: A reply that has come, or will.
Reply = torch.futures.Future[Message]
#: Takes one call, in a thread of RPC: enqueues the work and returns at once. The future becomes the reply.
Handler = Callable[[str, list[torch.Tensor]], Reply]


@dataclass(frozen=True, slots=True)
class Membership:
    """This rank in its group."""

    rank: int
    world_size: int
    epoch: int
    #: 64 hex digits, fresh for every epoch.
    secret: str
    #: Most seconds to wait for the other ranks.
    join_timeout_s: float
    device: str = "cpu"


class _Wire:
    """Takes the place of torch's pickler. One per process: RPC knows no more than one membership."""

    def __init__(self) -> None:
        self.secret = b""
        self.handler: Handler | None = None

    def serialize(self, value: Any) -> tuple[bytes, list[torch.Tensor]]:
        """A call, a reply or an error as bytes and tensors."""
        if isinstance(value, internal.PythonUDF):
            head, tensors = value.args
            return b"C" + self.secret + head.encode(), tensors
        if isinstance(value, internal.RemoteException):
            return b"E" + value.msg.encode(), []
        head, tensors = value
        return b"R" + head.encode(), tensors

    def deserialize(self, content: bytes, tensors: list[torch.Tensor]) -> Any:
        """The counterpart. What is none of the three, or has not the secret, comes out as an error."""
        kind = content[:1]
        if kind == b"R":
            return content[1:].decode(), tensors
        if kind == b"E":
            return internal.RemoteException(content[1:].decode("utf-8", "replace"), RuntimeError)
        if kind == b"C" and hmac.compare_digest(content[1 : 1 + _SECRET_CHARS], self.secret):
            return content[1 + _SECRET_CHARS :].decode(), tensors
        return internal.RemoteException("this rank takes calls of its own group only", RuntimeError)

    def run(self, call: Any) -> Any:
        """What RPC calls for every arriving call."""
        if isinstance(call, internal.RemoteException):
            return call
        if self.handler is None:
            return internal.RemoteException("this rank has left its group", RuntimeError)
        try:
            return self.handler(*call)
        except Exception as error:  # noqa: BLE001 - told to the caller
            return internal.RemoteException(f"{type(error).__name__}: {error}", RuntimeError)


_wire: Final = _Wire()


def join(membership: Membership, store: Store, handler: Handler) -> None:
    """Meets the other ranks through `store` and connects to each of them. Raises GroupLost where they do not come."""
    _replace_pickler(membership.secret, handler)
    try:
        _start(membership, store)
        _greet(membership, store)
    except RuntimeError as error:
        raise GroupLost(f"the ranks of epoch {membership.epoch} did not meet: {first_line(error)}") from error


def bind_to(interface: str) -> None:
    """Makes RPC and gloo listen on one network interface only. Before either starts."""
    for variable in ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        os.environ[variable] = interface


def _replace_pickler(secret: str, handler: Handler) -> None:
    if len(secret) != _SECRET_CHARS:
        raise ValueError(f"the epoch's secret must have {_SECRET_CHARS} hex digits, got {len(secret)}")
    _wire.secret = secret.encode()
    _wire.handler = handler
    api._default_pickler = _wire  # type: ignore[assignment]
    internal.serialize = _wire.serialize
    internal.deserialize = _wire.deserialize
    internal._run_function = _wire.run


def _start(membership: Membership, store: Store) -> None:
    def meet(url: str, **_: object) -> Iterator[tuple[Store, int, int]]:
        yield store, membership.rank, membership.world_size

    register_rendezvous_handler(_SCHEME, meet)  # type: ignore[no-untyped-call]
    is_cuda = membership.device != "cpu"
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"{_SCHEME}://{membership.epoch}",
        rpc_timeout=membership.join_timeout_s,
        devices=[membership.device] if is_cuda else None,
        _transports=list(_TRANSPORTS),
        _channels=list((*_CUDA_CHANNELS, *_CHANNELS) if is_cuda else _CHANNELS),
    )
    if is_cuda:
        for other in range(membership.world_size):
            if other != membership.rank:
                options.set_device_map(_name(other), {membership.device: membership.device})
    with warnings.catch_warnings(), _no_pickled_barrier():
        # torch's own use of its own deprecated name, once per join.
        warnings.filterwarnings("ignore", message="You are using a Backend", category=UserWarning)
        rpc.init_rpc(  # type: ignore[no-untyped-call]
            _name(membership.rank), rank=membership.rank, world_size=membership.world_size, rpc_backend_options=options
        )


@contextmanager
def _no_pickled_barrier() -> Iterator[None]:
    """torch ends its start with a barrier made of pickled calls; `_greet` does the same without."""
    barrier = api._all_gather
    api._all_gather = lambda *_, **__: {}
    try:
        yield
    finally:
        api._all_gather = barrier


def _greet(membership: Membership, store: Store) -> None:
    """Calls every other rank once, so that all connections exist, and waits until all others have done so."""
    others = [rank for rank in range(membership.world_size) if rank != membership.rank]
    store.set(f"started/{membership.rank}", "1")
    store.wait([f"started/{rank}" for rank in others])
    for future in [call(rank, "", [torch.zeros(1)]) for rank in others]:
        future.wait()
    store.set(f"greeted/{membership.rank}", "1")
    store.wait([f"greeted/{rank}" for rank in others])


def call(rank: int, head: str, tensors: Sequence[torch.Tensor]) -> Reply:
    """Calls `rank`; the future holds its reply, or a RuntimeError where it is lost or refuses. Tensors must not change until then."""
    future: Reply = rpc.rpc_async(_name(rank), _receive, (head, list(tensors)), timeout=_CALL_TIMEOUT_S)
    return future


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _receive(head: str, tensors: list[torch.Tensor]) -> Reply:
    """Stands for the other rank's handler: the whole of the allow-list. What arrives is run by `_Wire.run`."""
    raise RuntimeError("called on the wrong side")


def replied(head: str = "", tensors: Sequence[torch.Tensor] = ()) -> Reply:
    """A reply that is there already."""
    future = new_reply(tensors)
    future.set_result((head, list(tensors)))
    return future


def new_reply(tensors: Sequence[torch.Tensor] = ()) -> Reply:
    """A reply to be given later; `tensors` shows on which devices its content will lie."""
    devices: list[int | str | torch.device] = list({tensor.device for tensor in tensors if tensor.is_cuda})
    return torch.futures.Future(devices=devices) if devices else torch.futures.Future()


def leave() -> None:
    """Lets go at once, without waiting for the others."""
    if _wire.handler is not None:
        _wire.handler = None
        rpc.shutdown(graceful=False)


@contextmanager
def autograd_context() -> Iterator[int]:
    """A context of `torch.distributed.autograd`: calls made inside, from this thread, are recorded for `backward`."""
    with dist_autograd.context() as context:
        yield context


def backward(context: int, score: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """d score / d value through every rank that was called inside the context. `score` is a scalar, `value` a leaf of this rank."""
    dist_autograd.backward(context, [score])  # type: ignore[attr-defined]
    gradient: torch.Tensor | None = dist_autograd.get_gradients(context).get(value)  # type: ignore[attr-defined]
    return torch.zeros_like(value) if gradient is None else gradient


def _name(rank: int) -> str:
    return f"rank-{rank}"

"""The ranks of one group over PyTorch RPC; the only module that imports `torch.distributed.rpc`.

Every rank owns one torch thread. The leader sends each step as a numbered command to all other ranks and runs its own part meanwhile; a
handler does nothing but put the command into its rank's torch thread, because thread-local caches are lost between RPC's own threads. A
command from another epoch, or out of order, is refused.

RPC runs what it is told by whoever can connect: it is bound to the loopback interface unless the environment names another, meets through
files in a 0700 directory, and its transports are `uv` (the default busy-polls) with `cma` and `basic` channels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch.distributed import rpc

from tensorway.errors import Unavailable
from tensorway.model import Inputs, Outputs, Value
from tensorway_worker.rank.group_port import GroupLost, StepRunner

_TRANSPORTS: Final = ("uv",)
_CHANNELS: Final = ("cma", "basic")
#: torch wants a bound for every call; a step may take long, and a dead peer is seen at once without it.
_CALL_TIMEOUT_S: Final = 3600.0

#: Puts work into the rank's torch thread.
Enqueue = Callable[[Callable[[], None]], None]


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """Where this rank stands."""

    rank: int
    world_size: int
    epoch: int
    rendezvous_dir: Path
    #: Most seconds to wait for the other ranks.
    join_timeout_s: float


class RpcGroup:
    """Implements `RankGroup` on PyTorch RPC."""

    def __init__(self, place: GroupPlace, run_own: StepRunner, enqueue: Enqueue) -> None:
        self._place = place
        self._run_own = run_own
        self._enqueue = enqueue
        #: Number of the next command: sent by the leader, expected by the others.
        self._sequence = 0

    def join(self) -> None:
        global _member
        place = self._place
        for variable in ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")
        options = rpc.TensorPipeRpcBackendOptions(
            init_method=f"file://{place.rendezvous_dir}/epoch-{place.epoch}",
            rpc_timeout=place.join_timeout_s,
            _transports=list(_TRANSPORTS),
            _channels=list(_CHANNELS),
        )
        _member = self
        try:
            with warnings.catch_warnings():
                # torch's own use of its own deprecated name, once per join.
                warnings.filterwarnings("ignore", message="You are using a Backend", category=UserWarning)
                rpc.init_rpc(  # type: ignore[no-untyped-call]
                    _name(place.rank), rank=place.rank, world_size=place.world_size, rpc_backend_options=options
                )
        except RuntimeError as error:
            raise GroupLost(f"the ranks of epoch {place.epoch} did not meet: {_first_line(error)}") from error

    def run(self, inputs: Inputs) -> Outputs:
        if self._place.world_size == 1:
            return self._run_own(inputs)
        names, tensors = list(inputs), [_tensor(name, value) for name, value in inputs.items()]
        sequence, self._sequence = self._sequence, self._sequence + 1
        try:
            pending = [
                rpc.rpc_async(_name(rank), _take_step, (self._place.epoch, sequence, names, tensors), timeout=_CALL_TIMEOUT_S)
                for rank in range(1, self._place.world_size)
            ]
            try:
                return self._run_own(inputs)
            finally:
                # The others' part ends with this step, whatever became of our own, so that no rank ever runs ahead.
                for future in pending:
                    future.wait()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or not _is_of_rpc(error):
                raise
            raise GroupLost(f"a rank of epoch {self._place.epoch} was lost: {_first_line(error)}") from error

    def leave(self) -> None:
        global _member
        if _member is self:
            _member = None
            rpc.shutdown(graceful=False)

    def take_step(self, epoch: int, sequence: int, inputs: Inputs) -> torch.futures.Future[str]:
        """A follower's side of one step, called by RPC's thread. The future holds "" or what went wrong in the model."""
        done: torch.futures.Future[str] = torch.futures.Future()
        if epoch != self._place.epoch:
            done.set_exception(RuntimeError(f"rpc: command of epoch {epoch} reached epoch {self._place.epoch}"))  # type: ignore[arg-type]
        else:
            self._enqueue(partial(self._follow, sequence, inputs, done))
        return done

    def _follow(self, sequence: int, inputs: Inputs, done: torch.futures.Future[str]) -> None:
        if sequence != self._sequence:
            done.set_exception(RuntimeError(f"rpc: command {sequence} came where {self._sequence} was expected"))  # type: ignore[arg-type]
            return
        self._sequence += 1
        try:
            self._run_own(inputs)
        except Exception as error:  # noqa: BLE001
            # The leader runs the same step and meets the same error; the reply only keeps the ranks together.
            done.set_result(f"{type(error).__name__}: {error}")
        else:
            done.set_result("")


#: This process's membership: RPC can only call functions of a module.
_member: RpcGroup | None = None


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _take_step(epoch: int, sequence: int, names: list[str], tensors: list[torch.Tensor]) -> torch.futures.Future[str]:
    """What the leader calls on every other rank: the whole of the allow-list."""
    if _member is None:
        raise RuntimeError("rpc: this rank has left its group")
    return _member.take_step(epoch, sequence, dict(zip(names, tensors, strict=True)))


def _name(rank: int) -> str:
    return f"rank-{rank}"


def _tensor(name: str, value: Value) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise Unavailable(f"input {name} is BYTES, which cannot be sent to other ranks; turn it into tensors in preprocess")
    return value


def _is_of_rpc(error: RuntimeError) -> bool:
    """RPC has no exception type of its own: its failures are plain RuntimeErrors raised by its futures."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") in (__name__, "torch.distributed.rpc.api")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

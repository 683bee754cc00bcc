"""The ranks of one group: pipeline stages x tensor shards, linked by PyTorch RPC (`rpc.py`) and collectives (`collective.py`).

    leader (stage 0, shard 0) ──step n──▶ every shard of stage 0       all run stage 0, summing over the shards inside their layers
    shard t of stage s        ──step n──▶ shard t of stage s + 1       activations hop from rank to rank
    shard 0 of the last stage ──result n──▶ leader                     the outputs

A batch goes through a pipeline as micro-batches, and the leader may have two batches on their way, so that all stages have work. Handlers
of RPC only enqueue to their rank's one torch thread, in the order of the commands' numbers (`in_order.py`): thread-local caches are lost
between RPC's threads, and collectives must meet the same partners everywhere.

A group is never repaired: the first sign of a lost rank fails every step and ends this rank; its node then forms the group anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch.distributed.distributed_c10d import Store

from tensorway.errors import FailedPrecondition, TensorwayError
from tensorway.model import Inputs, Outputs, Value
from tensorway_worker.engines.port import Collective, Engine, model_error
from tensorway_worker.micro_batches import micro_batches
from tensorway_worker.rank import rpc
from tensorway_worker.rank.carry import after_arrival, arrived, compact, sendable
from tensorway_worker.rank.collective import open_collective
from tensorway_worker.rank.commands import ATTEND, BACKWARD, FAILED, FORWARD, RESULT, SIDE, SKIP, STEP, Command, failure_detail, failure_of
from tensorway_worker.rank.door import Door, refuse_strangers
from tensorway_worker.rank.executor import Work
from tensorway_worker.rank.gradient_port import Differentiator
from tensorway_worker.rank.group_port import GroupLost, StepRunner, first_line
from tensorway_worker.rank.in_order import InOrder
from tensorway_worker.rank.linked_gradients import AutogradDifferentiator, BackwardPasses, ChainDifferentiator
from tensorway_worker.rank.memory import GuardedRun, MemoryGuard
from tensorway_worker.rank.pending import Named, Pending
from tensorway_worker.rank.side_calls import SideCalls
from tensorway_worker.rank.step_trace import NO_TRACING, current, step_detail
from tensorway_worker.topology import Place, Topology

if TYPE_CHECKING:
    from tensorway_worker.rank.adaptation_linked import LinkedTraining

#: Batches on their way through a pipeline at once.
_PIPELINED_BATCHES: Final = 2
VJP: Final = "vjp"
DIST_AUTOGRAD: Final = "dist_autograd"


class LinkedGroup:
    """Implements `RankGroup` for a group of several ranks. Made, joined and attached in that order."""

    def __init__(
        self,
        topology: Topology,
        membership: rpc.Membership,
        directory: Path,
        enqueue: Callable[[Work], None],
        on_lost: Callable[[GroupLost], None],
    ) -> None:
        self.topology = topology
        self.place: Place = topology.place(membership.rank)
        self.num_conductors = _PIPELINED_BATCHES if topology.pipeline > 1 else 1
        #: Rows that each micro-batch is made of are decided by this many wanted micro-batches; 0 lets us choose.
        self.wanted_micro_batches = 0
        self.is_batchable = True
        #: Of a group that trains.
        self.training: LinkedTraining | None = None
        self.tracing = NO_TRACING
        self.side_calls = SideCalls(membership.epoch)
        self.in_order = InOrder(enqueue)
        self.pending = Pending(topology.tensor, self.lose)
        self._membership = membership
        self._directory = directory
        self._on_lost = on_lost
        self._engine: Engine | None = None
        self._guard: MemoryGuard | None = None
        self._run_own: StepRunner | None = None
        self._passes = BackwardPasses(self)
        self._sending = threading.Lock()

    def join(self, store: Store, interface: str) -> Collective:
        """In the torch thread: meets the other ranks, and closes the door behind them. Raises GroupLost where they do not come."""
        rpc.bind_to(interface)
        door = Door()
        collective = open_collective(self.topology, self._membership.rank, store, self._membership.device)
        rpc.join(self._membership, store, self._on_message)
        door.close()
        refuse_strangers(door, store, self.rank, self.topology.world_size, self.epoch)
        return collective

    def attach(self, engine: Engine, guard: MemoryGuard | None = None) -> None:
        """In the torch thread, after loading: this rank's part of the model. Commands that have come meanwhile are let through."""
        self._engine = engine
        self._guard = guard
        self._run_own = engine.run if guard is None else GuardedRun(guard, engine.run, checks=self.topology.tensor == 1)
        self.in_order.open()

    @property
    def rank(self) -> int:
        return self._membership.rank

    @property
    def epoch(self) -> int:
        return self._membership.epoch

    @property
    def engine(self) -> Engine:
        """This rank's part. Raises GroupLost before it is attached."""
        if self._engine is None:
            raise GroupLost("a command came before the model was loaded")
        return self._engine

    def run(self, inputs: Inputs) -> Outputs:
        """The leader's, in a conductor's thread."""
        carry = {name: sendable(name, value) for name, value in inputs.items()}
        if self._guard is not None and self.topology.tensor > 1:
            self._guard.check(inputs)
        outcomes, trace = [], current()
        with self._sending:
            # One batch's micro-batches follow one another, so that its last leaves as early as can be.
            for part in self._parts(carry):
                number, (outcome,) = self.pending.begin()
                outcomes.append(outcome)
                command = Command(STEP, number, tuple(part), step_detail(trace))
                self.start(command, list(part.values()), partial(self.step, number, part, None, trace))
        # All of them, even where one fails: none may be on its way when this step counts as ended.
        errors = [error for outcome in outcomes if (error := outcome.exception()) is not None]
        if errors:
            raise errors[0]
        results = [outcome.result() for outcome in outcomes]
        if len(results) == 1:
            return dict(results[0])
        return {name: torch.cat([result[name] for result in results]) for name in results[0]}

    def run_in_one(self, inputs: Inputs) -> Outputs:
        """Like `run`, in one micro-batch: what can be compared bit by bit with the uncut model. While nothing else runs."""
        wanted, self.wanted_micro_batches = self.wanted_micro_batches, 1
        try:
            return self.run(inputs)
        finally:
            self.wanted_micro_batches = wanted

    def _parts(self, carry: Named) -> list[Named]:
        if not self.is_batchable or not carry:
            return [carry]
        sizes = micro_batches(len(next(iter(carry.values()))), self.topology.pipeline, self.wanted_micro_batches)
        if len(sizes) == 1:
            return [carry]
        split = {name: torch.split(tensor, list(sizes)) for name, tensor in carry.items()}
        return [{name: pieces[index] for name, pieces in split.items()} for index in range(len(sizes))]

    def start(self, command: Command, tensors: Sequence[torch.Tensor], own_work: Work) -> None:
        """The leader's: a command for all shards of stage 0, this one among them."""
        for shard in range(1, self.topology.tensor):
            self.send(shard, command, tensors)
        self.in_order.put(command.number, own_work)

    def differentiator(self, name: str) -> Differentiator:
        if name in ("", VJP):
            return ChainDifferentiator(self, self._passes)
        if name != DIST_AUTOGRAD:
            raise FailedPrecondition(f"differentiation: must be {VJP} or {DIST_AUTOGRAD}, got {name!r}", field="differentiation")
        if self.topology.tensor > 1 or self._membership.device != "cpu":
            raise FailedPrecondition(
                f"differentiation: {DIST_AUTOGRAD} works between CPU ranks without tensor shards; leave it out to use {VJP}",
                field="differentiation",
            )
        return AutogradDifferentiator(self)

    def leave(self) -> None:
        rpc.leave()

    # What follows happens on every rank.

    def _on_message(self, head: str, tensors: list[torch.Tensor]) -> rpc.Reply:
        """Called by RPC's threads: enqueues, and answers at once."""
        if not head:
            return rpc.replied()  # a greeting
        command = Command.from_head(head, self._membership.epoch)
        number = command.number
        named = dict(zip(command.names, tensors, strict=False))
        if command.kind == STEP:
            # The leader's own call of the last stage is answered with the outcome: half the messages of a pipeline of two.
            reply = rpc.new_reply(tensors) if command.detail.get("reply") else None
            self.in_order.put(number, after_arrival(tensors, partial(self.step, number, named, reply, command.detail.get("trace", ""))))
            if reply is not None:
                return reply
        elif command.kind == RESULT:
            arrived(tensors)
            self.pending.resolve(number, named)
        elif command.kind == FAILED:
            rank = int(command.detail["rank"])
            self.pending.fail(number, self.topology.place(rank).stage, rank, failure_of(command.detail))
        elif command.kind == SIDE:
            return self.side_calls.answer(command.detail)
        elif command.kind == SKIP:
            self.in_order.put(number, partial(self.skip_on, number))
        elif command.kind == ATTEND:
            reply = rpc.new_reply(tensors)
            self.in_order.put(number, after_arrival(tensors, partial(self._passes.attend, named, reply)))
            return reply
        elif command.kind in (FORWARD, BACKWARD):
            self._passes.on_message(command, tensors)
        elif self.training is not None:
            self.training.on_message(command, tensors)
        else:
            raise ValueError(f"unknown command {command.kind!r}")
        return rpc.replied()

    def step(self, number: int, carry: Named, reply: rpc.Reply | None = None, trace: str = "") -> None:
        """In the torch thread: this stage's part of a step. `reply`, where there is one, takes the outcome to the leader."""
        outputs = self.attempt(number, self.tracing.part(partial(self._own_part, carry), trace))
        if outputs is None:
            self.skip_on(number)
        elif not self.place.is_last:
            is_answered = self.rank == 0 and self.topology.pipeline == 2
            self.send_on(Command(STEP, number, tuple(outputs), step_detail(trace, replies=is_answered)), list(outputs.values()))
        elif reply is None:
            self.deliver(number, outputs)
        if reply is not None:
            outcome = outputs or {}
            head = Command(RESULT, number, tuple(outcome)).to_head(self.epoch) if outputs is not None else ""
            reply.set_result((head, [compact(tensor) for tensor in outcome.values()]))

    def _own_part(self, carry: Named) -> Outputs:
        if self._run_own is None:
            raise GroupLost("a command came before the model was loaded")
        return self._run_own({**carry})

    def attempt(self, number: int, part: Callable[[], Mapping[str, Value]]) -> Named | None:
        """What `part` returns; None where the model failed, of which the leader is told. A lost group passes through."""
        try:
            return {name: sendable(name, value) for name, value in part().items()}
        except (GroupLost, torch.AcceleratorError):
            raise
        except Exception as error:  # noqa: BLE001 - a model raises anything; it is the step's outcome
            self.report_failure(number, self.model_error(error))
            return None

    def model_error(self, error: Exception) -> TensorwayError:
        """What a model's exception means to the caller."""
        return model_error(error, self._directory, "forward")

    def report_failure(self, number: int, error: TensorwayError) -> None:
        """Tells the leader that there will be no outcome."""
        if self.rank == 0:
            self.pending.fail(number, 0, 0, error)
        else:
            self.send(0, Command(FAILED, number, (), failure_detail(error, self.rank)), ())

    def skip_on(self, number: int) -> None:
        """Has the later stages skip `number`, so that their numbering stays without gaps."""
        if not self.place.is_last:
            self.send_on(Command(SKIP, number), ())

    def skip_from(self, stage: int, number: int) -> None:
        """The leader's: has `stage` and those after it skip `number`."""
        for shard in range(self.topology.tensor):
            self.send(self.topology.rank(stage, shard), Command(SKIP, number), ())

    def deliver(self, number: int, outcome: Named) -> None:
        """The outcome of `number`, to the leader; only one shard's is needed."""
        if self.place.shard:
            return
        if self.rank == 0:
            self.pending.resolve(number, outcome)
        else:
            self.send(0, Command(RESULT, number, tuple(outcome)), list(outcome.values()))

    def send_on(self, command: Command, tensors: Sequence[torch.Tensor]) -> None:
        """To the same shard of the next stage."""
        self.send(self.topology.rank(self.place.stage + 1, self.place.shard), command, tensors)

    def send(self, rank: int, command: Command, tensors: Sequence[torch.Tensor]) -> None:
        """To `rank`, without waiting; that it did not arrive loses the group."""
        future = rpc.call(rank, command.to_head(self._membership.epoch), [compact(tensor) for tensor in tensors])
        future.add_done_callback(partial(self._sent, rank))

    def _sent(self, rank: int, future: rpc.Reply) -> None:
        try:
            head, tensors = future.value()
        except RuntimeError as error:
            self.lose(GroupLost(f"rank {rank} of epoch {self._membership.epoch} was lost: {first_line(error)}"))
            return
        if head:
            arrived(tensors)
            outcome = Command.from_head(head, self.epoch)
            self.pending.resolve(outcome.number, dict(zip(outcome.names, tensors, strict=True)))

    def lose(self, lost: GroupLost) -> None:
        """From any thread: nothing of this epoch can go on."""
        self.pending.lose(lost)
        self._on_lost(lost)

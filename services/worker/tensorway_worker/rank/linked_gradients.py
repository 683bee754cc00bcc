"""Derivatives across the ranks of a group: `Differentiator` twice.

`ChainDifferentiator`: a chain of vector-Jacobian products. Forward like a step, each rank keeping its own graph; the last stage takes
the derivative of the target with respect to what it received and sends it back, stage by stage. Works with shards and between GPUs.

`AutogradDifferentiator`: `torch.distributed.autograd`. The leader calls one stage after the other inside a context, and torch finds its
way back through all of them. Documented by torch as unsupported on CUDA.

Both take their numbers among the steps, so that they run in the same place of the order on every rank, and never mix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from tensorway.model import Inputs
from tensorway_worker.rank import rpc
from tensorway_worker.rank.carry import after_arrival
from tensorway_worker.rank.commands import ATTEND, BACKWARD, FORWARD, Command, failure_detail, failure_of, target_detail, target_of
from tensorway_worker.rank.differentiation import Tape, first_stage, later_stage, ordinary, score_of
from tensorway_worker.rank.gradient_port import Gradient, Target
from tensorway_worker.rank.group_port import GroupLost, first_line
from tensorway_worker.rank.pending import Named

if TYPE_CHECKING:
    from tensorway_worker.rank.group import LinkedGroup


class BackwardPasses:
    """This rank's share in chains of vector-Jacobian products."""

    def __init__(self, group: LinkedGroup) -> None:
        self._group = group
        #: Number of the backward pass -> what its forward pass kept. Touched in the torch thread only.
        self._tapes: dict[int, Tape] = {}

    def on_message(self, command: Command, tensors: list[torch.Tensor]) -> None:
        """In a thread of RPC."""
        number = command.number
        if command.kind == BACKWARD:
            gradients = dict(zip(command.names, tensors, strict=True))
            work = partial(self.backward, number, gradients, bool(command.detail.get("skip")))
        else:
            work = partial(self.forward, command, tensors)
        self._group.in_order.put(number, after_arrival(tensors, work))

    def forward(self, command: Command, tensors: Sequence[torch.Tensor]) -> None:
        """In the torch thread: this stage with its graph kept; the last stage turns round."""
        group, number, detail = self._group, command.number, command.detail
        tensors = [ordinary(tensor) for tensor in tensors]
        target, rest = target_of(detail, tensors)
        own = list(tensors[len(rest) :])
        at = rest.pop() if detail["has_at"] else None
        carry = dict(zip(command.names, rest, strict=True))
        score: Named = {}

        def part() -> Named:
            with torch.inference_mode(False), torch.enable_grad():
                is_first = group.place.is_first
                tape = first_stage(group.engine, {**carry}, detail["name"], at) if is_first else later_stage(group.engine, carry)
                if group.place.is_last:
                    rows, chosen = score_of(tape.outputs, target)
                    tape = Tape({"": rows.sum()}, tape.leaves)
                    score.update(score=rows.detach(), chosen=chosen)
            self._tapes[number + 1] = tape
            return {} if group.place.is_last else dict(tape.outputs)

        outputs = group.attempt(number, part)
        if outputs is None:
            self._give_up(number)
        elif group.place.is_last:
            group.deliver(number, score)
            group.in_order.put(number + 1, partial(self.backward, number + 1, {"": torch.ones(())}, False))
        else:
            kept = [tensor.detach() for tensor in outputs.values()]
            group.send_on(Command(FORWARD, number, tuple(outputs), {**detail, "has_at": False}), [*kept, *own])

    def backward(self, number: int, gradients: Mapping[str, torch.Tensor], is_skipped: bool) -> None:
        """In the torch thread: back through this stage, and on to the one before."""
        group = self._group
        tape = self._tapes.pop(number, None)
        found: Named | None = None
        if tape is not None and not is_skipped:
            found = group.attempt(number, partial(self._back, tape, gradients))
        if group.place.is_first:
            if found is not None and not group.place.shard:
                (leaf,) = tape.leaves.values() if tape is not None else (None,)
                group.pending.resolve(number, {"gradient": next(iter(found.values())), "value": leaf.detach()} if leaf is not None else {})
            return
        before = group.topology.rank(group.place.stage - 1, group.place.shard)
        if found is None:
            group.send(before, Command(BACKWARD, number, (), {"skip": True}), ())
        else:
            group.send(before, Command(BACKWARD, number, tuple(found)), list(found.values()))

    def _back(self, tape: Tape, gradients: Mapping[str, torch.Tensor]) -> Named:
        with torch.inference_mode(False):
            return tape.back({name: ordinary(gradient).to(tape.outputs[name]) for name, gradient in gradients.items()})

    def _give_up(self, number: int) -> None:
        """Both numbers of a failed pass are used up on every rank: later stages skip them, earlier ones are sent back empty-handed."""
        group = self._group
        group.skip_on(number)
        group.skip_on(number + 1)
        group.in_order.put(number + 1, partial(self.backward, number + 1, {}, True))

    def attend(self, carry: Named, reply: rpc.Reply) -> None:
        """In the torch thread: this stage for the leader's autograd context. The carry's tensors are part of its graph."""
        # The reply must be given where gradients are recorded: else torch sends it as a plain tensor, and the way back ends here.
        with torch.inference_mode(False), torch.enable_grad():
            try:
                outputs = {name: value for name, value in self._group.engine.run({**carry}).items() if isinstance(value, torch.Tensor)}
            except Exception as error:  # noqa: BLE001 - a model raises anything; the leader is told
                failure = failure_detail(self._group.model_error(error), self._group.rank)
                reply.set_result((json.dumps({"failure": failure}), []))
            else:
                reply.set_result((json.dumps({"names": list(outputs)}), list(outputs.values())))


class ChainDifferentiator:
    """A chain of vector-Jacobian products, started by the leader."""

    def __init__(self, group: LinkedGroup, passes: BackwardPasses) -> None:
        self._group = group
        self._passes = passes

    def gradient(self, inputs: Inputs, name: str, at: torch.Tensor | None, target: Target) -> Gradient:
        group = self._group
        tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
        names = tuple(key for key, value in inputs.items() if isinstance(value, torch.Tensor))
        detail, own = target_detail(target)
        tensors += [*([] if at is None else [at]), *own]
        number, (scored, derived) = group.pending.begin(2)
        command = Command(FORWARD, number, names, {**detail, "name": name, "has_at": at is not None})
        group.start(command, tensors, partial(self._passes.forward, command, tensors))
        error = scored.exception()
        if error is not None:
            group.pending.drop(number + 1)
            raise error
        score, gradient = scored.result(), derived.result()
        return Gradient(gradient["value"], gradient["gradient"], score["score"], score["chosen"])


class AutogradDifferentiator:
    """`torch.distributed.autograd`, driven by the leader in its torch thread."""

    def __init__(self, group: LinkedGroup) -> None:
        self._group = group

    def gradient(self, inputs: Inputs, name: str, at: torch.Tensor | None, target: Target) -> Gradient:
        group = self._group
        number, (outcome,) = group.pending.begin()
        group.in_order.put(number, partial(self._run, number, inputs, name, at, target))
        found = outcome.result()
        return Gradient(found["value"], found["gradient"], found["score"], found["chosen"])

    def _run(self, number: int, inputs: Inputs, name: str, at: torch.Tensor | None, target: Target) -> None:
        """In the torch thread. A context is known to the thread that opened it, so the whole way goes from here."""
        group = self._group
        stage = 0

        def part() -> Named:
            nonlocal stage
            with torch.inference_mode(False), torch.enable_grad(), rpc.autograd_context() as context:
                tape = first_stage(group.engine, inputs, name, at)
                carry = dict(tape.outputs)
                for stage in range(1, group.topology.pipeline):
                    carry = self._attended(stage, number, carry)
                score, chosen = score_of(carry, target)
                leaf = tape.leaves[name]
                gradient = rpc.backward(context, score.sum(), leaf)
            return {"value": leaf.detach(), "gradient": gradient, "score": score.detach(), "chosen": chosen}

        found = group.attempt(number, part)
        if found is not None:
            group.pending.resolve(number, found)
        elif stage + 1 < group.topology.pipeline:
            # The stages that were not reached have the number still before them.
            group.skip_from(stage + 1, number)

    def _attended(self, stage: int, number: int, carry: Named) -> Named:
        head = Command(ATTEND, number, tuple(carry)).to_head(self._group.epoch)
        try:
            head, tensors = rpc.call(stage, head, list(carry.values())).wait()
        except RuntimeError as error:
            raise GroupLost(f"rank {stage} of epoch {self._group.epoch} was lost: {first_line(error)}") from error
        reply = json.loads(head)
        if "failure" in reply:
            raise failure_of(reply["failure"])
        return dict(zip(reply["names"], tensors, strict=True))

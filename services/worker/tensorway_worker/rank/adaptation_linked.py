"""A group of several ranks that trains: the commands that its ranks tell each other, see `commands.py`.

`torch.distributed.optim.DistributedOptimizer` is not used: it needs RRefs and pickled calls, which this group's RPC does not carry, knows
no tensor shards, and `torch.distributed.autograd` below it is documented as unsupported on CUDA (docs/decisions/0010-adaptation.md).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tensorway_worker.engines.port import Collective
from tensorway_worker.rank.adaptation_share import LOSS, Share, Wish
from tensorway_worker.rank.adaptation_ties import Tie, places_of, ties_of
from tensorway_worker.rank.carry import compact
from tensorway_worker.rank.commands import BEGIN, RETURN, SAVE, SHARE, TRAIN, UPDATE, Command
from tensorway_worker.rank.differentiation import ordinary
from tensorway_worker.rank.group import LinkedGroup
from tensorway_worker.rank.group_port import GroupLost
from tensorway_worker.rank.pending import Named

#: (number of the update, key of the weight, stage that sends).
_Key = tuple[int, str, int]


class _Mailbox:
    """Gradients of tied weights from other stages, which come in any order. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[_Key, Future[torch.Tensor]] = {}

    def put(self, key: _Key, gradient: torch.Tensor) -> None:
        self._of(key).set_result(gradient)

    def take(self, key: _Key) -> torch.Tensor:
        """Waits for it: a stage that is lost ends this rank, too."""
        gradient = self._of(key).result()
        with self._lock:
            del self._waiting[key]
        return gradient

    def _of(self, key: _Key) -> Future[torch.Tensor]:
        with self._lock:
            return self._waiting.setdefault(key, Future())


class LinkedTraining:
    """This rank's side of a training group; on the leader, it also leads. Made before the ranks meet."""

    def __init__(self, group: LinkedGroup) -> None:
        self._group = group
        #: Set once the ranks have met.
        self.collective: Collective | None = None
        self._share: Share | None = None
        self._mailbox = _Mailbox()
        self._failure: Exception | None = None
        #: The leader's.
        self._ties: list[Tie] = []
        group.training = self

    # The leader's, in a thread of its own; any failure ends the job, so numbers need not be used up after one.

    def begin(self, wish: Wish) -> tuple[set[str], dict[str, int]]:
        """Has all ranks get ready; returns what `Share.begin` does, of all of them."""
        found = self._round(BEGIN, wish.to_detail(), {}, self._begin)
        report = json.loads(bytes(found["report"].tolist()))
        self._ties = ties_of((key, stage, tuple(cut)) for key, stage, cut in report["places"])
        return set(report["chosen"]), report["sizes"]

    def step(self, inputs: Named, targets: Named) -> float:
        """One step of all ranks on one batch; its loss before the update."""
        group = self._group
        tensors = [*inputs.values(), *targets.values()]
        number, (scored, returned) = group.pending.begin(2)
        command = Command(TRAIN, number, tuple(inputs), {"targets": list(targets)})
        group.start(command, tensors, partial(self._train, command, tensors))
        loss = float(scored.result()[LOSS])
        returned.result()
        self._round(UPDATE, {"ties": [tie.to_detail() for tie in self._ties]}, {}, self._update)
        return loss

    def save(self, folder: Path) -> None:
        """Has all ranks write what they trained into `folder`."""
        self._round(SAVE, {"folder": str(folder)}, {}, self._save)

    def _round(self, kind: str, detail: Mapping[str, Any], tensors: Named, own: Any) -> Named:
        """A command that passes through all stages; what the last one says."""
        number, (outcome,) = self._group.pending.begin()
        command = Command(kind, number, tuple(tensors), detail)
        self._group.start(command, list(tensors.values()), partial(own, command))
        return outcome.result()

    # What follows happens on every rank.

    def on_message(self, command: Command, tensors: list[torch.Tensor]) -> None:
        """In a thread of RPC."""
        group, number = self._group, command.number
        rounds = {BEGIN: self._begin, UPDATE: self._update, SAVE: self._save}
        if command.kind == SHARE:
            self._mailbox.put((number, command.detail["key"], command.detail["stage"]), tensors[0])
        elif command.kind == TRAIN:
            group.in_order.put(number, partial(self._train, command, tensors))
        elif command.kind == RETURN:
            group.in_order.put(number, partial(self._return, number, dict(zip(command.names, tensors, strict=True))))
        elif command.kind in rounds:
            group.in_order.put(number, partial(rounds[command.kind], command))
        else:
            raise ValueError(f"unknown command {command.kind!r}")

    @property
    def share(self) -> Share:
        """This rank's. In the torch thread, once the model is loaded."""
        if self._share is None:
            if self.collective is None:
                raise GroupLost("a command came before the ranks had met")
            self._share = Share(self._group.engine, self._group.place, self.collective)
        return self._share

    def _begin(self, command: Command) -> None:
        group = self._group
        report: dict[str, Any] = {}

        def part() -> Named:
            chosen, sizes = self.share.begin(Wish.from_detail(command.detail))
            before = command.detail.get("report", {"chosen": [], "sizes": {}, "places": []})
            own = places_of((one.held for one in self.share.trained), group.place.stage)
            report.update(
                chosen=sorted({*before["chosen"], *chosen}), places=[*before["places"], *own], sizes={**before["sizes"], **sizes}
            )
            return {"report": torch.tensor(list(json.dumps(report).encode()), dtype=torch.uint8)}

        self._pass_on(command, {**command.detail, "report": report}, group.attempt(command.number, part))

    def _train(self, command: Command, tensors: list[torch.Tensor]) -> None:
        group, number = self._group, command.number
        targets = dict(zip(command.detail["targets"], tensors[len(command.names) :], strict=True))
        carry = dict(zip(command.names, tensors, strict=False))
        outputs = group.attempt(number, partial(self._forward, carry, targets))
        if outputs is None:
            return
        if group.place.is_last:
            group.deliver(number, outputs)
            group.in_order.put(number + 1, partial(self._return, number + 1, {}))
        else:
            group.send_on(Command(TRAIN, number, tuple(outputs), command.detail), [*outputs.values(), *targets.values()])

    def _forward(self, carry: Named, targets: Named) -> Named:
        self._refuse_after_failure()
        return self.share.forward(carry, targets)

    def _refuse_after_failure(self) -> None:
        """An update is answered by the last stage, which may be through before an earlier one fails: then the next command fails."""
        if self._failure is not None:
            raise self._failure

    def _return(self, number: int, gradients: Named) -> None:
        group = self._group
        found = group.attempt(number, partial(self.share.backward, gradients))
        if found is None:
            return
        if group.place.is_first:
            if group.rank == 0:
                group.pending.resolve(number, {})
            return
        before = group.topology.rank(group.place.stage - 1, group.place.shard)
        group.send(before, Command(RETURN, number, tuple(found)), list(found.values()))

    def _update(self, command: Command) -> None:
        number = command.number
        ties = [Tie.from_detail(detail) for detail in command.detail["ties"]]
        if not self._group.place.is_last:
            # First of all: a later stage may hold what this one waits for.
            self._group.send_on(command, ())

        def part() -> Named:
            try:
                self.share.update(ties, partial(self._exchange, number))
            except Exception as error:
                self._failure = error
                raise
            return {}

        if self._group.attempt(number, part) is not None and self._group.place.is_last:
            self._group.deliver(number, {})

    def _exchange(self, number: int, tie: Tie, own: torch.Tensor) -> torch.Tensor:
        """The sum of a tied weight's gradients over all stages that hold it, added up in the same order on each."""
        group, place = self._group, self._group.place
        for stage in tie.stages:
            if stage != place.stage:
                command = Command(SHARE, number, ("gradient",), {"key": tie.key, "stage": place.stage})
                group.send(group.topology.rank(stage, place.shard), command, [compact(own)])
        found = [own if stage == place.stage else ordinary(self._mailbox.take((number, tie.key, stage))).to(own) for stage in tie.stages]
        return torch.stack(found).sum(0) if len(found) > 1 else own

    def _save(self, command: Command) -> None:
        group = self._group

        def part() -> Named:
            self._refuse_after_failure()
            self.share.save(Path(command.detail["folder"]), group.rank)
            # The last stage answers for all: none passes the command on before all its shards have written.
            self._collective_barrier()
            return {}

        self._pass_on(command, command.detail, group.attempt(command.number, part))

    def _collective_barrier(self) -> None:
        if self.collective is not None and self.collective.num_shards > 1:
            self.collective.sum_(torch.zeros(1, device=self._group.engine.device))

    def _pass_on(self, command: Command, detail: Mapping[str, Any], outcome: Named | None) -> None:
        if outcome is None:
            return
        if self._group.place.is_last:
            self._group.deliver(command.number, outcome)
        else:
            self._group.send_on(Command(command.kind, command.number, (), detail), ())

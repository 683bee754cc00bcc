"""One rank's share of a training: its own parameters, what a forward pass kept of them, their gradients, and their optimizer's state.

A group trains as one: forward from stage to stage, the loss on the last, vector-Jacobian products back (each rank adding to the gradients
of its own parameters on the way), then every rank's own optimizer. SGD and AdamW work element by element, so slices of a parameter on
several shards, each with an optimizer of its own, come out as the whole parameter would.

The model stays in evaluation mode: no dropout, and running statistics stay as they are. Weights in half precision are trained as float32
copies, or small steps would be lost in rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import torch

from tensorway.errors import FailedPrecondition, ModelFailed
from tensorway_worker.adaptation_wire import SGD
from tensorway_worker.engines.port import Collective, Engine
from tensorway_worker.engines.rewriting import Adaptable, HeldWeight
from tensorway_worker.rank.adaptation_files import no_room
from tensorway_worker.rank.adaptation_losses import loss_of
from tensorway_worker.rank.adaptation_ties import Tie, key_of
from tensorway_worker.rank.differentiation import ordinary
from tensorway_worker.rank.pending import Named
from tensorway_worker.topology import Place

_HALVES: Final = (torch.bfloat16, torch.float16)
#: Gradients of a parameter that all shards hold whole may differ by so much of their size.
_EQUAL_GRADIENTS: Final = 1e-3
LOSS: Final = "loss"


@dataclass(frozen=True, slots=True)
class Wish:
    """How to train; the same on every rank."""

    loss: str
    optimizer: str
    learning_rate: float
    only: tuple[str, ...]

    def to_detail(self) -> dict[str, Any]:
        """As a command carries it."""
        return asdict(self)

    @classmethod
    def from_detail(cls, detail: Mapping[str, Any]) -> Wish:
        return cls(detail["loss"], detail["optimizer"], detail["learning_rate"], tuple(detail["only"]))


@dataclass(slots=True)
class Trained:
    """One parameter that is trained."""

    held: HeldWeight
    #: What the optimizer changes: the parameter itself, or its float32 copy.
    master: torch.Tensor

    def take_gradient(self) -> None:
        """Moves the gradient to the copy, where there is one."""
        parameter = self.held.parameter
        if self.master is not parameter and parameter.grad is not None:
            self.master.grad, parameter.grad = parameter.grad.float(), None

    def put_back(self) -> None:
        """Rounds the copy into the parameter."""
        if self.master is not self.held.parameter:
            self.held.parameter.copy_(self.master)


class Share:
    """See the module's docstring. Everything happens in the torch thread."""

    def __init__(self, engine: Engine, place: Place, collective: Collective) -> None:
        self._engine = engine
        self._place = place
        self._collective = collective
        self._loss = ""
        self._trained: list[Trained] = []
        self._optimizer: torch.optim.Optimizer | None = None
        #: What the last forward pass gave, and what it was given to differentiate by.
        self._outputs: Mapping[str, torch.Tensor] = {}
        self._leaves: Mapping[str, torch.Tensor] = {}
        self._has_compared = False

    @property
    def trained(self) -> Sequence[Trained]:
        """What this rank trains, in the same order on all shards of its stage."""
        return self._trained

    def begin(self, wish: Wish) -> tuple[set[str], dict[str, int]]:
        """Chooses the parameters and makes their optimizer. Returns the patterns that chose something, and the size of each weight that
        is trained here or in part here: key -> elements of the whole. Raises FailedPrecondition where weights could not be written back.
        """
        if not isinstance(self._engine, Adaptable):
            raise FailedPrecondition(
                "engine: the weights of this engine are part of a compiled program, or lie with another library; only the engines python "
                "and transformers (without settings.placement) can be adapted",
                field="engine",
            )
        self._loss = wish.loss
        chosen: set[str] = set()
        with torch.inference_mode(False), torch.no_grad():
            for held in self._engine.held_weights():
                names = {*held.names, *(place.name for place in held.stored)}
                by = {pattern for pattern in wish.only if any(fnmatchcase(name, pattern) for name in names)}
                chosen |= by
                if by or not wish.only:
                    held.parameter.requires_grad_(True)
                    is_half = held.parameter.dtype in _HALVES
                    self._trained.append(Trained(held, held.parameter.detach().float() if is_half else held.parameter))
            if self._trained:
                kind = torch.optim.SGD if wish.optimizer == SGD else torch.optim.AdamW
                self._optimizer = kind([one.master for one in self._trained], lr=wish.learning_rate)
        shares = self._place.num_shards
        sizes = {key_of(one.held): one.master.numel() * (1 if one.held.part is None else shares) for one in self._trained}
        return chosen, sizes

    def forward(self, carry: Named, targets: Named) -> Named:
        """This stage's part; of the last stage {LOSS: scalar}, of any other what the next one needs."""
        with torch.inference_mode(False), torch.enable_grad():
            given = {name: ordinary(tensor).detach() for name, tensor in carry.items()}
            targets = {name: ordinary(tensor) for name, tensor in targets.items()}
            if not self._place.is_first:
                self._leaves = {name: one.requires_grad_() for name, one in given.items() if one.is_floating_point()}
            found = self._engine.run({**given})
            outputs = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
            if self._place.is_last:
                outputs = {LOSS: loss_of(self._loss, outputs, targets)}
                if not outputs[LOSS].requires_grad:
                    raise ModelFailed("forward: nothing that is trained reaches the targets; does it run under torch.no_grad()?")
            self._outputs = outputs
        return {name: value.detach() for name, value in outputs.items()}

    def backward(self, gradients: Mapping[str, torch.Tensor]) -> Named:
        """Given d loss / d what `forward` returned ({} on the last stage), adds to the gradients of this rank's parameters and returns
        d loss / d what it was given."""
        outputs, leaves = self._outputs, self._leaves
        self._outputs, self._leaves = {}, {}
        with torch.inference_mode(False), torch.enable_grad():
            if self._place.is_last:
                gradients = {LOSS: torch.ones_like(outputs[LOSS])}
            pairs = [(outputs[name], ordinary(one).to(outputs[name])) for name, one in gradients.items() if outputs[name].requires_grad]
            if pairs:
                torch.autograd.backward([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}

    def update(self, ties: Sequence[Tie], exchange: Callable[[Tie, torch.Tensor], torch.Tensor]) -> None:
        """One step of the optimizer. `exchange` sums a tied weight's gradient with those of other stages."""
        if self._optimizer is None:
            return
        with torch.inference_mode(False), torch.no_grad():
            for one in self._trained:
                one.take_gradient()
            self._compare_shards()
            for tie in ties:
                self._sum_tied(tie, exchange)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            for one in self._trained:
                one.put_back()

    def _compare_shards(self) -> None:
        """What all shards hold whole must get the same gradient on each, which the first step shows: a layer that works on its shard's own
        slice (a norm of single heads) would get a part of it only. Raises FailedPrecondition naming it."""
        if self._place.num_shards == 1 or self._has_compared:
            return
        self._has_compared = True
        whole = [one for one in self._trained if one.held.part is None]
        if not whole:
            return
        marks = torch.stack([_mark(one.master.grad) for one in whole]).unsqueeze(1).to(self._engine.device)
        every = self._collective.gather(marks, 1)
        off = (every - every[:, :1]).abs().amax(1) > _EQUAL_GRADIENTS * every.abs().amax(1)
        if off.any():
            name = whole[int(off.nonzero()[0])].held.names[0]
            raise FailedPrecondition(
                f"{name} is held whole by all tensor shards, and gets another gradient on each: it cannot be trained with parallel.tensor "
                "above 1; leave it out with `only`, or adapt a directory with tensor: 1",
                field="only",
            )

    def _sum_tied(self, tie: Tie, exchange: Callable[[Tie, torch.Tensor], torch.Tensor]) -> None:
        if self._place.stage not in tie.stages:
            return
        own = [one for one in self._trained if key_of(one.held) == tie.key]
        total: torch.Tensor | None = None
        for one in own:
            gradient = torch.zeros_like(one.master) if one.master.grad is None else one.master.grad
            if not tie.is_alike and one.held.part is not None:
                gradient = self._collective.gather(gradient.contiguous(), one.held.part.dim)
            total = gradient if total is None else total + gradient
        if total is None:
            raise FailedPrecondition(f"{tie.key} is held by no parameter of stage {self._place.stage}")
        total = exchange(tie, total.contiguous())
        for one in own:
            part = None if tie.is_alike else one.held.part
            one.master.grad = (total if part is None else total[part.index()]).clone()

    def save(self, folder: Path, rank: int) -> None:
        """Writes this rank's trained weights into `folder`. Raises FailedPrecondition where the disk is full."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        listed: list[dict[str, Any]] = []
        tensors: Named = {}
        for number, one in enumerate(self._trained):
            part = one.held.part
            if part is None and self._place.shard:
                continue
            tensors[str(number)] = one.master.detach().contiguous().cpu()
            stored = [asdict(place) for place in one.held.stored]
            listed.append({"key": str(number), "stored": stored, "part": None if part is None else (part.dim, part.start, part.length)})
        try:
            save_file(tensors, folder / f"rank-{rank}.safetensors")
            (folder / f"rank-{rank}.json").write_text(json.dumps(listed), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise no_room(error, folder) from error


def _mark(gradient: torch.Tensor | None) -> torch.Tensor:
    """A number that different gradients do not share. [] float64"""
    if gradient is None:
        return torch.zeros((), dtype=torch.float64)
    flat = gradient.detach().flatten().double().cpu()
    return (flat * torch.linspace(1.0, 2.0, len(flat), dtype=torch.float64)).sum()

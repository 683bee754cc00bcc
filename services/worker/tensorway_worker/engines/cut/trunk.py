"""Where a model can be cut: the places in its step at which one tensor is all that the rest still needs.

A network need not look like a list of layers for that. From a `Trace` it is known which values are made before a place and read after it
(liveness, as a compiler's register allocator asks it). A module's end is a cut point where exactly one such value lives: what that module
returned. Residual connections inside a layer, a U-Net's skips or a loss that reads an early layer keep a second value alive: no cut there.
Glue (what is computed from the inputs alone) does not count: every stage computes it again.

Modules are opened as far as they are chains: the list of layers of a transformer, the stages of a ResNet, nested nn.Sequential. A layer
with a residual connection stays whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch.utils._pytree import tree_leaves

from tensorway_worker.engines.cut.trace import Call, Trace

#: Modules that list other modules: a module that has one is a chain wherever its parts can be cut.
_LISTS: Final = (torch.nn.ModuleList, torch.nn.Sequential)
_MAX_REASONS: Final = 8


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A run of calls between two cut points that follow each other."""

    calls: tuple[Call, ...]
    #: Operations [begin, end) of the trace.
    begin: int
    end: int

    @property
    def name(self) -> str:
        """Path of its module, or of the first and last of several."""
        if not self.calls:
            return "(forward)"
        first, last = self.calls[0].name, self.calls[-1].name
        return first if first == last else f"{first} … {last}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the model cannot be cut at the end of `module`."""

    module: str
    reason: str


class Trunk:
    """A traced model as consecutive units."""

    def __init__(self, root: torch.nn.Module, trace: Trace, *, is_chain: bool = False) -> None:
        """`is_chain`: the root's own children are the units, one call each, because the author says so (`stages()`)."""
        self.trace = trace
        self._lists = {name for name, module in root.named_modules() if any(isinstance(child, _LISTS) for child in module.modules())}
        #: Parameters and buffers: name -> bytes.
        self.weights = {name: tensor.nbytes for name, tensor in (*root.named_parameters(), *root.named_buffers())}
        #: Their memory, of which a view is no activation.
        self._memory = {tensor.untyped_storage()._cdata for tensor in (*root.parameters(), *root.buffers())}
        #: Every activation's first making and last reading.
        self._life = _lives(trace)
        self.refusals: list[Refusal] = []
        #: The calls that a stage which comes later leaves out, in order.
        self.closed: tuple[Call, ...] = tuple(trace.root.children if is_chain else self._opened(trace.root))
        self.units: tuple[Unit, ...] = tuple(_one_each(self.closed) if is_chain else self._units())

    @cached_property
    def live_bytes(self) -> list[int]:
        """Bytes of the activations that live during each operation."""
        change = [0] * (len(self.trace.operations) + 2)
        seen = set(self._memory)
        for key, (made, read) in self._life.items():
            tensor = self.trace.tensors.get(key)
            # Views share memory; it counts once, for the first of them.
            if tensor is None or tensor.untyped_storage()._cdata in seen:
                continue
            seen.add(tensor.untyped_storage()._cdata)
            change[made] += tensor.nbytes
            change[min(read, len(self.trace.operations)) + 1] -= tensor.nbytes
        total = 0
        for time, delta in enumerate(change):
            total += delta
            change[time] = total
        return change

    def _opened(self, call: Call) -> list[Call]:
        """The calls that stand for `call`: itself, or those inside it where it is a chain."""
        inside = [part for child in call.children if child.activations for part in self._opened(child)]
        if call is self.trace.root:
            return inside
        cuts = [self._refusal(part) is None for part in inside[:-1]]
        is_list = any(cuts) and call.name in self._lists
        is_chain = bool(cuts) and all(cuts) and not self._works_itself(call)
        return inside if is_list or is_chain else [call]

    def _works_itself(self, call: Call) -> bool:
        """Whether its own code computes with activations or weights, beside calling modules."""
        own = [one for one in self.trace.operations[call.begin : call.end] if one.call is call]
        return any(one.reads or one.weights for one in own)

    def _units(self) -> list[Unit]:
        units: list[Unit] = []
        calls: list[Call] = []
        begin = 0
        for call in self.closed[:-1]:
            calls.append(call)
            reason = self._refusal(call)
            if reason is None:
                units.append(Unit(tuple(calls), begin, call.end))
                begin, calls = call.end, []
            else:
                self.refusals.append(Refusal(call.name, reason))
        return [*units, Unit((*calls, *self.closed[-1:]), begin, len(self.trace.operations))]

    def _refusal(self, call: Call) -> str | None:
        """Why there is no cut point at the end of `call`; None where there is one."""
        alive = self._alive(call.end)
        activations = call.activations
        if call.name in self.trace.embeddings.values():
            return "it is the embedding of an input, which stays with what reads it"
        if len({id(one) for one in activations}) != 1:
            return f"it returns {len(activations)} tensors"
        if alive - {id(activations[0])}:
            others = sorted({self._maker(key) for key in alive - {id(activations[0])}})
            return f"what {', '.join(others)} made is still needed after it"
        if not alive:
            return "nothing after it needs what it returns"
        if any(_is_own_glue(leaf, call) for leaf in tree_leaves(call.output)):
            return "it returns a tensor that depends on the inputs alone beside the activation"
        return None

    def _alive(self, time: int) -> set[int]:
        return {key for key, (made, read) in self._life.items() if made < time <= read}

    def _maker(self, key: int) -> str:
        made, _ = self._life[key]
        return self.trace.operations[made].call.name or "forward itself"


def _lives(trace: Trace) -> dict[int, tuple[int, int]]:
    """Activation -> time of the operation that made it and of the last that reads it (or the step's end for an output)."""
    made: dict[int, int] = {}
    read: dict[int, int] = {}
    for time, operation in enumerate(trace.operations):
        for key in operation.reads:
            read[key] = time
        for key in operation.makes:
            made.setdefault(key, time)
    for output in tree_leaves(trace.outputs):
        if isinstance(output, torch.Tensor):
            read[id(output) if output.is_meta else output.untyped_storage()._cdata] = len(trace.operations)
    return {key: (time, read[key]) for key, time in made.items() if key in read}


def _one_each(calls: Sequence[Call]) -> list[Unit]:
    begins = [0, *(call.end for call in calls)]
    return [Unit((call,), begin, call.end) for call, begin in zip(calls, begins, strict=False)]


def _is_own_glue(leaf: object, call: Call) -> bool:
    """A real tensor that `call` made itself: whoever leaves the call out cannot return it."""
    if not isinstance(leaf, torch.Tensor) or leaf.is_meta:
        return False
    return all(leaf is not given for given in tree_leaves((call.args, dict(call.kwargs))))


def label(units: Sequence[Unit]) -> str:
    """`embeddings … encoder.layer.2` for a run of units."""
    names = [unit.name for unit in units]
    return names[0] if len(names) == 1 else f"{names[0].split(' … ')[0]} … {names[-1].split(' … ')[-1]}"


def why_not(trunk: Trunk, num_stages: int) -> str:
    """One sentence: why there are too few units for `num_stages`."""
    shown = [f"not after {refusal.module} ({refusal.reason})" for refusal in trunk.refusals[:_MAX_REASONS]]
    more = len(trunk.refusals) - len(shown)
    reasons = "; ".join(shown) + (f"; and {more} more" if more > 0 else "")
    count = len(trunk.units)
    return f"it is one chain of {count} part{'s' if count != 1 else ''} only, {num_stages} are wanted{': ' if reasons else ''}{reasons}"

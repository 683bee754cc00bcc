"""What one stage of a cut model has to do, worked out from the trunk and the boundaries that all ranks agreed on. Pure.

A stage runs the model's own forward. The calls before its window are left out: the last of them returns what was received, the others
return something that nobody looks at, or something of the right shape where glue does. After its window the forward is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from tensorway_worker.engines.cut.trace import Call
from tensorway_worker.engines.cut.trunk import Trunk, Unit


class Filling(Enum):
    """What a call that is left out returns in place of an activation."""

    #: The received activation itself: nobody looks at it, or it has the right shape and is only looked at.
    RECEIVED = "received"
    #: A tensor of the right shape, with any content: glue computes with it, and the result is thrown away.
    BLANK = "blank"


@dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of what a call that is left out returns."""

    #: The value itself, where it is no activation.
    constant: object = None
    #: Position among the leaves of the call's arguments, where it returns what it was given; -1: it does not.
    argument: int = -1
    filling: Filling | None = None
    dtype: torch.dtype | None = None
    #: Name under which its shape travels in the carry; empty: it is that of the received activation.
    shape_key: str = ""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A call of a stage before this one."""

    module: str
    index: int
    structure: TreeSpec
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True, slots=True)
class Exit:
    """The call after which a stage is done."""

    module: str
    index: int
    #: Which leaf of its result is the activation.
    leaf: int


@dataclass(frozen=True, slots=True)
class Noted:
    """A call of this stage whose result's shape travels on."""

    module: str
    index: int
    leaf: int
    key: str


@dataclass(frozen=True, slots=True)
class Part:
    """The part of one stage."""

    units: tuple[Unit, ...]
    left_out: tuple[LeftOut, ...]
    #: None: the last stage.
    exit: Exit | None
    #: Parameters and buffers that it needs, by name.
    weights: frozenset[str]
    #: Floating-point inputs whose content a later stage needs; of any other only the shape travels on.
    inputs_ahead: frozenset[str]
    #: Shapes that later stages need, by `Leaf.shape_key`.
    shapes_ahead: frozenset[str]
    #: Those of them that are this stage's own to note.
    noted: tuple[Noted, ...] = ()
    #: Inputs that forward writes into.
    changed_inputs: frozenset[str] = field(default_factory=frozenset)
    #: Whether it writes into the activation that it receives.
    changes_received: bool = False

    @property
    def is_first(self) -> bool:
        return not self.left_out


def part_of(trunk: Trunk, boundaries: Sequence[int], stage: int) -> Part:
    """The part of `stage`, where stage s holds units [boundaries[s], boundaries[s + 1])."""
    own = _alone(trunk, boundaries, stage)
    later = [_alone(trunk, boundaries, other) for other in range(stage + 1, len(boundaries) - 1)]
    begins = [trunk.units[boundaries[other]].begin for other in range(stage + 1, len(boundaries) - 1)]
    inputs = set(trunk.trace.deciding_inputs)
    for operation in trunk.trace.operations[begins[0] if begins else len(trunk.trace.operations) :]:
        inputs |= operation.inputs
    wanted = {
        Noted(call.module, call.index, place, leaf.shape_key)
        for part in later for call in part.left_out for place, leaf in enumerate(call.leaves) if leaf.shape_key
    }
    calls_here = {(call.name, call.index) for unit in own.units for call in unit.calls}
    calls_before = {(call.module, call.index) for call in own.left_out}
    wanted = {one for one in wanted if (one.module, one.index) in calls_here | calls_before}
    return replace(
        own,
        inputs_ahead=frozenset(inputs),
        shapes_ahead=frozenset(one.key for one in wanted),
        noted=tuple(one for one in wanted if (one.module, one.index) in calls_here),
        changed_inputs=frozenset(trunk.trace.changed_inputs),
    )


def _alone(trunk: Trunk, boundaries: Sequence[int], stage: int) -> Part:
    """The part without what later stages want of it."""
    units = trunk.units[boundaries[stage] : boundaries[stage + 1]]
    begin, end = units[0].begin, units[-1].end
    foreign = [call for call in trunk.closed if call.end <= begin and stage > 0]
    is_left_out = _covered(len(trunk.trace.operations), foreign)
    is_last = boundaries[stage + 1] == len(trunk.units)
    weights = {
        name
        for time, operation in enumerate(trunk.trace.operations[:end])
        if time >= begin or not is_left_out[time]
        for name in operation.weights
    }
    # A weight of an own module that this one step did not read may be read by the next.
    modules = tuple(f"{call.name}." for unit in units for call in unit.calls)
    weights |= {name for name in trunk.weights if name.startswith(modules)}
    consumed = {key for time, one in enumerate(trunk.trace.operations[:begin]) if not is_left_out[time] for key in one.reads}
    looked_at = {
        key for key, times in trunk.trace.shape_reads.items() if any(not is_left_out[min(time, len(is_left_out) - 1)] for time in times)
    }
    received = foreign[-1].activations[0] if foreign else None
    left_out = tuple(_left_out(call, received, consumed, looked_at) for call in foreign)
    leave = None if is_last else _exit(units[-1].calls[-1])
    changes = received is not None and any(id(received) in one.makes for one in trunk.trace.operations[begin:end])
    return Part(units, left_out, leave, frozenset(weights), frozenset(), frozenset(), changes_received=changes)


def _covered(num_operations: int, calls: Sequence[Call]) -> list[bool]:
    """For each time whether it lies in one of `calls`."""
    covered = [False] * (num_operations + 1)
    for call in calls:
        covered[call.begin : call.end] = [True] * (call.end - call.begin)
    return covered


def _left_out(call: Call, received: torch.Tensor | None, consumed: set[int], looked_at: set[int]) -> LeftOut:
    values, structure = tree_flatten(call.output)
    arguments = tree_leaves((call.args, dict(call.kwargs)))
    leaves: list[Leaf] = []
    for value in values:
        if not isinstance(value, torch.Tensor):
            leaves.append(Leaf(constant=value))
        elif not value.is_meta:
            leaves.append(Leaf(argument=next(place for place, given in enumerate(arguments) if given is value)))
        elif value is received:
            leaves.append(Leaf(filling=Filling.RECEIVED))
        else:
            key = f"{call.name}#{call.index}#{len(leaves)}"
            leaves.append(_activation(key, value, received, id(value) in consumed, id(value) in looked_at))
    return LeftOut(call.name, call.index, structure, tuple(leaves))


def _activation(key: str, value: torch.Tensor, received: torch.Tensor | None, is_consumed: bool, is_looked_at: bool) -> Leaf:
    is_alike = received is not None and value.shape == received.shape
    if not is_consumed and (is_alike or not is_looked_at) and received is not None and value.dtype == received.dtype:
        return Leaf(filling=Filling.RECEIVED)
    return Leaf(filling=Filling.BLANK, dtype=value.dtype, shape_key="" if is_alike else key)


def _exit(call: Call) -> Exit:
    leaves = tree_leaves(call.output)
    return Exit(call.name, call.index, next(place for place, leaf in enumerate(leaves) if leaf is call.activations[0]))

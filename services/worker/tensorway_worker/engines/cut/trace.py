"""What a model does in one step: its calls of modules and its operations. `tracer.trace` finds it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from tensorway.model import Outputs


@dataclass(slots=True, eq=False)
class Call:
    """One call of one module."""

    #: The module's path under the root; empty for the call of the whole model.
    name: str
    #: How many calls of this module came before it in the same step.
    index: int
    parent: Call | None
    #: Time (number of operations so far) before its first and after its last operation.
    begin: int
    end: int = 0
    children: list[Call] = field(default_factory=list)
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    output: Any = None

    @property
    def activations(self) -> list[torch.Tensor]:
        """The tensors without content among what it returned."""
        return [leaf for leaf in tree_leaves(self.output) if isinstance(leaf, torch.Tensor) and leaf.is_meta]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation at its time, in the innermost call around it. Tensors are named by their `id`."""

    call: Call
    #: Activations that it reads, and that it makes or changes.
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    #: Parameters and buffers that it reads, by name.
    weights: tuple[str, ...]
    #: Inputs of the model whose content reaches it through glue.
    inputs: frozenset[str]
    flops: int


@dataclass(slots=True)
class Trace:
    """One step of a model."""

    root: Call
    operations: list[Operation] = field(default_factory=list)
    #: Activations whose shape is looked at: id -> times of the looks.
    shape_reads: dict[int, list[int]] = field(default_factory=dict)
    #: Inputs whose content decides what code runs.
    deciding_inputs: set[str] = field(default_factory=set)
    #: Inputs that the model writes into.
    changed_inputs: set[str] = field(default_factory=set)
    #: Integer input -> the first torch.nn.Embedding that gets it.
    embeddings: dict[str, str] = field(default_factory=dict)
    #: Activations by id, kept so that no id is given twice.
    tensors: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: Outputs = field(default_factory=dict)
    _glue: list[torch.Tensor] = field(default_factory=list)

    def keep(self, tensor: torch.Tensor) -> None:
        """Remembers a tensor; `tensors` holds those without content."""
        if tensor.is_meta:
            self.tensors[id(tensor)] = tensor
        else:
            self._glue.append(tensor)

"""Tensor shards: layers that hold a slice of their weights and sum or join what the shards make.

The scheme is Megatron-LM's (Shoeybi et al., 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism", section 3): a column-parallel layer makes a slice of the outputs from a whole input; a row-parallel layer takes it and the
shards' results are summed, one sum a block. Backwards it is the other way round: where a whole tensor enters a block, its gradients are
summed. Values outside of blocks, and their gradients, are equal on every shard; so all shards of a stage run each step, forwards and
backwards, in the same order. (DTensor does the same seven times slower from PyTorch RPC's threads.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from tensorway.errors import FailedPrecondition
from tensorway_worker.engines.cut.crossings import Entrance, copied_in, joined, split_in, summed
from tensorway_worker.engines.cut.tensor_plan import KeptWhole, Word, resolve, summary
from tensorway_worker.engines.cut.weights_source import Slice
from tensorway_worker.engines.port import Collective
from tensorway_worker.topology import Place


@dataclass(frozen=True, slots=True)
class Sharding:
    """What `shard_module` has done to a model."""

    #: Parameter name -> the slice of it that this shard holds; a parameter that is not here is whole.
    slices: Mapping[str, Slice] = field(default_factory=dict)
    #: What stayed whole although the plan or the shards asked for more; `tensor_plan.summary` makes sentences of it.
    kept_whole: Sequence[KeptWhole] = ()


class ColumnLinear(nn.Linear):
    """A linear layer that holds its own rows of the weight: makes its own slice of the outputs from a whole input.

    [..., in_features] -> [..., out_features / num_shards], or [..., out_features] where outputs are joined. `out_features` is the slice's.
    """

    def __init__(self, whole: nn.Linear, collective: Collective, entrance: Entrance | None) -> None:
        """Args:
        whole: the layer to replace, on the meta device; its width must divide by the shards.
        entrance: where its block's input enters; None joins the outputs at once.
        """
        rows = whole.out_features // collective.num_shards
        super().__init__(whole.in_features, rows, whole.bias is not None, device="meta", dtype=whole.weight.dtype)
        self._collective = collective
        self._entrance = entrance

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self._entrance is not None:
            return functional.linear(self._entrance.enter(input), self.weight, self.bias)
        return joined(functional.linear(copied_in(input, self._collective), self.weight, self.bias), self._collective)


class RowLinear(nn.Linear):
    """A linear layer that holds its own columns of the weight: takes its own slice of the inputs; the shards' results are summed, and
    the bias, which every shard holds whole, is added once.

    [..., in_features / num_shards], or a whole [..., in_features] that it takes its slice of -> [..., out_features].
    """

    def __init__(self, whole: nn.Linear, collective: Collective, entrance: Entrance | None) -> None:
        """Args:
        whole: the layer to replace, on the meta device; its input's width must divide by the shards.
        entrance: that of its block, which ends here; None takes a whole input.
        """
        columns = whole.in_features // collective.num_shards
        super().__init__(columns, whole.out_features, whole.bias is not None, device="meta", dtype=whole.weight.dtype)
        self._collective = collective
        self._entrance = entrance

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self._entrance is None:
            input = split_in(input, self._collective)
        else:
            self._entrance.leave()
        total = summed(functional.linear(input, self.weight), self._collective)
        return total if self.bias is None else total + self.bias


class VocabularyEmbedding(nn.Embedding):
    """An embedding that holds its own run of the vocabulary; ids of others give zeros, and the shards' vectors are summed.

    ids [...] -> [..., embedding_dim]. `num_embeddings` is the run's.
    """

    def __init__(self, whole: nn.Embedding, collective: Collective) -> None:
        """`whole`: the layer to replace, on the meta device; its vocabulary must divide by the shards."""
        own = whole.num_embeddings // collective.num_shards
        super().__init__(own, whole.embedding_dim, device="meta", dtype=whole.weight.dtype)
        self._collective = collective
        self._first = own * collective.shard
        self._num_whole = whole.num_embeddings

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        local = input - self._first
        is_foreign = (local < 0) | (local >= self.num_embeddings)
        # An id outside of the whole vocabulary must fail on this shard as it would in the whole layer, not turn into zeros.
        is_nowhere = (input < 0) | (input >= self._num_whole)
        local = local.masked_fill(is_foreign & ~is_nowhere, 0).masked_fill(is_nowhere, self.num_embeddings)
        vectors = functional.embedding(local, self.weight)
        return summed(vectors.masked_fill(is_foreign.unsqueeze(-1), 0), self._collective)


class VectorsEmbedding(nn.Embedding):
    """An embedding that holds its own slice of every vector; the slices are joined. ids [...] -> [..., whole embedding_dim]."""

    def __init__(self, whole: nn.Embedding, collective: Collective) -> None:
        """`whole`: the layer to replace, on the meta device; its vectors' width must divide by the shards."""
        super().__init__(whole.num_embeddings, whole.embedding_dim // collective.num_shards, device="meta", dtype=whole.weight.dtype)
        self._collective = collective

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return joined(super().forward(input), self._collective)


#: The dimension along which a word cuts a layer's weight.
_CUT_DIM: Final = {
    Word.COLUMN: 0, Word.COLUMN_JOINED: 0, Word.ROW: 1, Word.ROW_FROM_WHOLE: 1, Word.VOCABULARY: 0, Word.VECTORS: 1,
}  # fmt: skip


def shard_module(model: nn.Module, plan: Mapping[str, str], place: Place, collective: Collective) -> Sharding:
    """Replaces layers of `model` in place by this shard's, as `plan` says; with one shard nothing is touched.

    Args:
        model: on the meta device; in a pipeline with or without the layers of other stages, whose parameters nobody reads. A weight
            that stands at several places (a head tied to the embedding) becomes one slice for each place.
        plan: from `tensor_plan.plan_of`.
        place: which shard; `collective` must be that of its stage.

    Returns:
        What to read of each parameter, and what stayed whole.
    """
    if place.num_shards == 1:
        return Sharding()
    decisions = resolve(model, plan, place.num_shards)
    slices: dict[str, Slice] = {}
    for block in decisions.blocks:
        entrance = Entrance(collective) if len(block) > 1 else None
        for name in block:
            whole: Any = model.get_submodule(name)
            word = decisions.cut[name]
            own = _replacement(whole, word, collective, entrance)
            own.train(whole.training).requires_grad_(whole.weight.requires_grad)
            length = own.weight.shape[_CUT_DIM[word]]
            part = Slice(_CUT_DIM[word], place.shard * length, length)
            slices[f"{name}.weight"] = part
            if part.dim == 0 and getattr(own, "bias", None) is not None:
                slices[f"{name}.bias"] = part
            _replace(model, name, own)
    return Sharding(slices, decisions.kept_whole)


def refuse_unsharded(sharding: Sharding, place: Place, model_name: str) -> None:
    """Raises FailedPrecondition where tensor shards were asked for and nothing could be cut: every rank would do all the work."""
    if place.num_shards > 1 and not sharding.slices:
        reasons = "; ".join(summary(sharding.kept_whole)) or "its tensor plan names no layer that it has"
        raise FailedPrecondition(
            f"{model_name}: nothing of it can be cut into {place.num_shards} tensor shards ({reasons}); set parallel.tensor to 1, or to a "
            "number that divides its heads and widths, and use parallel.pipeline instead",
            field="parallel.tensor",
        )


def _replacement(whole: Any, word: Word, collective: Collective, entrance: Entrance | None) -> Any:
    if word is Word.VOCABULARY:
        return VocabularyEmbedding(whole, collective)
    if word is Word.VECTORS:
        return VectorsEmbedding(whole, collective)
    kind = ColumnLinear if word in (Word.COLUMN, Word.COLUMN_JOINED) else RowLinear
    return kind(whole, collective, entrance)


def _replace(model: nn.Module, name: str, own: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, own)


"""Attention over the blocks of the KV cache, behind transformers' own attention interface.

A step's tokens lie one after another in one row, whatever sequences they belong to: [1, tokens, …]. Everything but attention works on each
token alone. Attention writes the new keys and values into their places of the cache and lets each sequence see its own.

Shapes: T tokens of the step, H query heads, K key/value heads (of this rank), D their width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.nn.functional import scaled_dot_product_attention

from tensorway.errors import FailedPrecondition
from tensorway_worker.engines.generation.layout import OneToken, Piece, StepLayout

#: Under this name transformers knows it.
NAME: Final = "tensorway_paged"
#: What some models' attention has besides, and this one has not.
_UNKNOWN: Final = ("softcap", "s_aux")

_current = threading.local()


class KeyValueCache:
    """Keys and values of this rank's layers. A layer's memory, [places, K, D] twice, is taken when it is first used."""

    def __init__(self, num_places: int, is_touched: bool) -> None:
        """
        Args:
            num_places: tokens that it has room for.
            is_touched: whether memory is to be there from the start, instead of being taken page by page as it is used.
        """
        self._num_places = num_places
        self._new = torch.zeros if is_touched else torch.empty
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of layer `index`, for tensors like `key` and `value` ([1, K, T, D])."""
        found = self._layers.get(index)
        if found is None:
            made = [
                self._new((self._num_places, like.shape[1], like.shape[3]), dtype=like.dtype, device=like.device) for like in (key, value)
            ]
            found = self._layers[index] = (made[0], made[1])
        return found

    @property
    def num_bytes(self) -> int:
        """Of all layers used so far."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._layers.values())


@contextmanager
def attending(cache: KeyValueCache, layout: StepLayout) -> Iterator[None]:
    """While it is open, attention in this thread is that of this step."""
    _current.step = (cache, layout)
    try:
        yield
    finally:
        _current.step = None


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: object, scaling: float | None = None,
    dropout: float = 0.0, sliding_window: int | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """See transformers' AttentionInterface. query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D of value]."""
    for name in _UNKNOWN:
        if more.get(name) is not None:
            raise FailedPrecondition(f"generation: the model's attention uses {name}, which is not supported", field="engine")
    output = query.new_empty((query.shape[2], query.shape[1], value.shape[3]))
    if query.is_meta:
        return output.unsqueeze(0), None
    step = getattr(_current, "step", None)
    if step is None:
        # The layers are being timed one by one, to be shared out among stages: the row is one sequence, and nothing is kept.
        gqa = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=gqa).transpose(1, 2), None
    cache, layout = step
    keys, values = cache.layer(module.layer_idx, key, value)
    keys.index_copy_(0, layout.places, key[0].transpose(0, 1))
    values.index_copy_(0, layout.places, value[0].transpose(0, 1))
    queries = query[0].transpose(0, 1)
    for group in layout.single:
        output.index_copy_(0, group.tokens, _one_token_each(queries, keys, values, group, scaling, sliding_window))
    for piece in layout.pieces:
        output[piece.begin : piece.begin + piece.count] = _piece(queries, keys, values, piece, scaling, sliding_window)
    return output.unsqueeze(0), None


def _one_token_each(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: OneToken, scaling: float | None, window: int | None
) -> torch.Tensor:
    """Sequences with one new token each, in one call: [sequences, H, D]. The query heads that share a key head are its queries."""
    rows, longest = len(group.tokens), group.longest
    num_heads = keys.shape[1]
    own = queries.index_select(0, group.tokens)
    folded = own.view(rows, num_heads, -1, own.shape[2])
    seen = keys.index_select(0, group.places).view(rows, longest, num_heads, -1).transpose(1, 2)
    known = values.index_select(0, group.places).view(rows, longest, num_heads, -1).transpose(1, 2)
    mask = group.mask(window, queries.dtype)
    found = scaled_dot_product_attention(folded, seen, known, attn_mask=mask, scale=scaling)
    return found.reshape(rows, own.shape[1], values.shape[2])


def _piece(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, piece: Piece, scaling: float | None, window: int | None
) -> torch.Tensor:
    """Several consecutive tokens of one sequence: [count, H, D]."""
    own = queries[piece.begin : piece.begin + piece.count].transpose(0, 1).unsqueeze(0)
    seen = keys.index_select(0, piece.places).transpose(0, 1).unsqueeze(0)
    known = values.index_select(0, piece.places).transpose(0, 1).unsqueeze(0)
    mask = piece.mask(window)
    found = scaled_dot_product_attention(
        own, seen, known, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=own.shape[1] != seen.shape[1]
    )
    return found[0].transpose(0, 1)


def no_mask(**_: object) -> None:
    """See transformers' AttentionMaskInterface: `attend` knows by itself what each token may see."""

"""Weights that a group holds more than once: tied ones (a head and the embedding), and those of a layer that several stages run.

Every place gets a gradient; the weight's own is their sum. The places start equal and get the same sum and the same optimizer, so they
stay equal. Where they are cut alike (both whole, or both by the same slices), each shard sums with its counterparts; where they are not,
whole gradients are put together first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tensorway_worker.engines.rewriting import HeldWeight


@dataclass(frozen=True, slots=True)
class Tie:
    """One weight that is held more than once."""

    key: str
    #: Stages that hold it, ascending.
    stages: tuple[int, ...]
    #: Whether all its places hold the same slice of it, shard by shard.
    is_alike: bool

    def to_detail(self) -> list[Any]:
        """As a command carries it."""
        return [self.key, self.stages, self.is_alike]

    @classmethod
    def from_detail(cls, detail: list[Any]) -> Tie:
        key, stages, is_alike = detail
        return cls(key, tuple(stages), is_alike)


def key_of(held: HeldWeight) -> str:
    """The same for all places of one weight."""
    return held.names[0]


#: (key, stage, how it is cut: dimension and number of elements there, or nothing).
Held = tuple[str, int, tuple[int, ...]]


def places_of(weights: Iterable[HeldWeight], stage: int) -> list[Held]:
    """The places of weights in this rank's stage."""
    return [(key_of(held), stage, () if held.part is None else (held.part.dim, held.part.length)) for held in weights]


def ties_of(places: Iterable[Held]) -> list[Tie]:
    """The weights that are held more than once, by all stages' `places_of` (of one shard each)."""
    by_key: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for key, stage, cut in places:
        by_key.setdefault(key, []).append((stage, tuple(cut)))
    return [
        Tie(key, tuple(sorted({stage for stage, _ in held})), len({cut for _, cut in held}) == 1)
        for key, held in sorted(by_key.items()) if len(held) > 1
    ]

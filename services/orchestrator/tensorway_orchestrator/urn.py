"""A set from which a few can be drawn at random without looking at the rest. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Urn(Generic[T]):
    """Adding, discarding and drawing cost the same whatever the number of items. Items are hashable."""

    _items: list[T] = field(default_factory=list)
    _places: dict[T, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: T) -> bool:
        return item in self._places

    def add(self, item: T) -> None:
        """Adds an item that is not in it."""
        self._places[item] = len(self._items)
        self._items.append(item)

    def discard(self, item: T) -> None:
        """Takes out an item that is in it."""
        place = self._places.pop(item)
        last = self._items.pop()
        if last is not item:
            self._items[place] = last
            self._places[last] = place

    def draw(self, num_draws: int, pick: Callable[[int], int]) -> list[T]:
        """`num_draws` different items, or all where there are no more, in random order as far as equals are concerned.

        `pick(n)` returns a random integer below n. Neighbours are drawn together: discarding moves the last item into the gap, so who is
        whose neighbour changes all the time, and one random number is enough.
        """
        items = self._items
        num = len(items)
        if num <= 1:
            return items[:]
        start = pick(num)
        if num <= num_draws:
            return items[start:] + items[:start]
        drawn = items[start : start + num_draws]
        return drawn if len(drawn) == num_draws else drawn + items[: num_draws - len(drawn)]

"""A step as plain integers on its way to every rank, and as each rank's attention reads it.

The step travels in the carry of the pipeline as tensors by name, so that every stage gets it with the activations:

    input_ids, position_ids   INT64 [1, tokens]
    ~rows                     INT64 [rows, 3]: first position, tokens, blocks
    ~tables                   INT64 [blocks of all rows]: the numbers of each row's blocks, one row after another
    ~drawing                  INT64 [drawing rows]: index of the token after which the next one is drawn
    ~draw.…                   how (`sampler.py`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, cast

import numpy
import numpy.typing
import torch

from tensorway.model import Inputs
from tensorway_worker.engines.generation.scheduler import Row

ROWS: Final = "~rows"
TABLES: Final = "~tables"
DRAWING: Final = "~drawing"
#: Sequences share a call of attention where the longest has at most this many times the tokens of the shortest.
_ALIKE: Final = 2
#: Below so many tokens, lengths do not matter.
_SHORT: Final = 64

Integers = numpy.typing.NDArray[numpy.int64]


def carried(rows: Sequence[Row]) -> Inputs:
    """The step's tensors without those of the draws."""
    ids: list[int] = []
    positions: list[int] = []
    table: list[int] = []
    shape: list[tuple[int, int, int]] = []
    drawing: list[int] = []
    for row in rows:
        end = row.start + row.count
        ids += row.sequence.ids[row.start : end]
        positions += range(row.start, end)
        table += row.sequence.blocks
        shape.append((row.start, row.count, len(row.sequence.blocks)))
        if row.draws:
            drawing.append(len(ids) - 1)
    return {
        "input_ids": torch.tensor([ids], dtype=torch.int64),
        "position_ids": torch.tensor([positions], dtype=torch.int64),
        ROWS: torch.tensor(shape, dtype=torch.int64),
        TABLES: torch.tensor(table, dtype=torch.int64),
        DRAWING: torch.tensor(drawing, dtype=torch.int64),
    }


@dataclass(slots=True)
class OneToken:
    """Rows of one token each that are alike in length."""

    #: Index of each row's token in the step. [rows]
    tokens: torch.Tensor
    #: Places in the cache of each row's tokens, the last one repeated up to `longest`. [rows * longest]
    places: torch.Tensor
    lengths: Integers
    longest: int
    _masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    def set_mask(self, mask: torch.Tensor) -> None:
        """Has `mask` taken as it is, for layers without a window."""
        self._masks[None] = mask

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores: 0 or minus infinity, [rows, 1, 1, longest]; None where every token sees all."""
        if window not in self._masks:
            places = numpy.arange(self.longest)
            hidden = places >= self.lengths[:, None]
            if window is not None:
                hidden |= places < self.lengths[:, None] - window
            self._masks[window] = _minus_infinity(hidden[:, None, None, :], dtype, self.tokens.device) if hidden.any() else None
        return self._masks[window]


@dataclass(slots=True)
class Piece:
    """Consecutive tokens of one sequence."""

    #: Index of the first in the step.
    begin: int
    count: int
    #: Position of the first in its sequence.
    start: int
    #: Places in the cache of all tokens up to the last one. [start + count]
    places: torch.Tensor
    _masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Which tokens each sees, [count, start + count]; None where that is all up to itself and it is the first piece."""
        if window not in self._masks:
            own = numpy.arange(self.start, self.start + self.count)[:, None]
            all_of_it = numpy.arange(self.start + self.count)[None, :]
            is_narrow = window is not None and window < self.start + self.count
            if self.start == 0 and not is_narrow:
                self._masks[window] = None
            else:
                seen = all_of_it <= own
                if window is not None and is_narrow:
                    seen &= all_of_it > own - window
                self._masks[window] = torch.from_numpy(seen).to(self.places.device)
        return self._masks[window]


@dataclass(slots=True)
class StepLayout:
    """What one rank's attention needs to know of a step."""

    #: Where the keys and values of the step's tokens go. [tokens]
    places: torch.Tensor
    single: list[OneToken]
    pieces: list[Piece]

    @staticmethod
    def of(carry: Inputs, block_tokens: int, device: torch.device) -> StepLayout:
        """Reads it from a step's carry; its own tensors lie on `device`."""
        rows, tables = cast("torch.Tensor", carry[ROWS]), cast("torch.Tensor", carry[TABLES])
        shape: list[list[int]] = rows.tolist()
        inside = numpy.arange(block_tokens, dtype=numpy.int64)
        all_places = (tables.cpu().numpy()[:, None] * block_tokens + inside).reshape(-1)
        written: list[Integers] = []
        single: list[tuple[int, int, Integers]] = []
        pieces: list[Piece] = []
        token = table = 0
        for start, count, num_blocks in shape:
            own = all_places[table * block_tokens : table * block_tokens + start + count]
            written.append(own[start:])
            if count == 1:
                single.append((start + 1, token, own))
            else:
                pieces.append(Piece(token, count, start, torch.from_numpy(own).to(device)))
            token += count
            table += num_blocks
        return StepLayout(torch.from_numpy(numpy.concatenate(written)).to(device), _alike(single, device), pieces)


def _alike(rows: list[tuple[int, int, Integers]], device: torch.device) -> list[OneToken]:
    """Rows (length, index of the token, places) in groups of similar lengths."""
    rows.sort(key=lambda row: row[0])
    groups: list[OneToken] = []
    begin = 0
    while begin < len(rows):
        most = max(rows[begin][0] * _ALIKE, _SHORT)
        end = begin
        while end < len(rows) and rows[end][0] <= most:
            end += 1
        longest = rows[end - 1][0]
        places = numpy.empty((end - begin, longest), numpy.int64)
        for index, (length, _, own) in enumerate(rows[begin:end]):
            places[index, :length] = own
            # Any place that holds numbers will do: it is masked.
            places[index, length:] = own[-1]
        tokens = torch.tensor([token for _, token, _ in rows[begin:end]], dtype=torch.int64, device=device)
        lengths = numpy.array([length for length, _, _ in rows[begin:end]])
        groups.append(OneToken(tokens, torch.from_numpy(places.reshape(-1)).to(device), lengths, longest))
        begin = end
    return groups


def _minus_infinity(hidden: numpy.typing.NDArray[numpy.bool_], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    mask = torch.zeros(hidden.shape, dtype=dtype)
    return mask.masked_fill_(torch.from_numpy(hidden), float("-inf")).to(device)

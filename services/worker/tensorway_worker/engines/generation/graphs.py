"""Decode steps as CUDA graphs: one launch for all of a step's kernels, where starting them one by one takes longer than running them.

A graph has fixed shapes. A step is put into the smallest one that it fits: so many rows, and so many tokens of the longest of them, both
rounded up. Rows that are left over write to a place of the cache that nobody reads. Graphs are captured when they are first needed and
share their memory. Only steps in which every row brings one token; any other runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy
import torch

from tensorway.model import Inputs
from tensorway_worker.engines.generation.layout import ROWS, TABLES, OneToken, StepLayout

#: Tokens of the longest row in the smallest graph.
_LEAST_LENGTH: Final = 256
#: Runs before a capture, on a stream of their own: libraries choose kernels and take memory then.
_WARM_UPS: Final = 2

#: (token ids [1, rows], positions [1, rows], places to draw after [rows], layout) -> logits [1, rows, vocabulary].
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, StepLayout], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Captured:
    """One graph and the tensors that it reads and writes."""

    graph: Any
    ids: torch.Tensor
    positions: torch.Tensor
    #: Where the new keys and values go. [rows]
    written: torch.Tensor
    #: Places of all tokens of all rows. [rows * longest]
    seen: torch.Tensor
    #: [rows, 1, 1, longest]
    mask: torch.Tensor
    logits: torch.Tensor


class DecodeGraphs:
    """The graphs of one rank that holds a whole model."""

    def __init__(self, forward: Forward, device: torch.device, dtype: torch.dtype, block_tokens: int, spare_place: int) -> None:
        """
        Args:
            dtype: of the queries, hence of the mask.
            spare_place: a place of the cache that belongs to no block.
        """
        self._forward = forward
        self._device = device
        self._dtype = dtype
        self._block_tokens = block_tokens
        self._spare_place = spare_place
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._pool: Any = torch.cuda.graph_pool_handle()

    def logits(self, inputs: Inputs) -> torch.Tensor:
        """Logits after each row's token, [rows, vocabulary]; valid until the next step."""
        carry = cast("dict[str, torch.Tensor]", inputs)
        rows: list[list[int]] = carry[ROWS].tolist()
        lengths = numpy.array([start + 1 for start, _, _ in rows])
        size = _rounded_up(len(rows), 1), _rounded_up(int(lengths.max()), _LEAST_LENGTH)
        captured = self._captured.get(size)
        if captured is None:
            captured = self._captured[size] = self._capture(*size)
        self._fill(captured, carry, rows, lengths, size)
        captured.graph.replay()
        return captured.logits[0, : len(rows)]

    def _fill(
        self, captured: _Captured, carry: dict[str, torch.Tensor], rows: list[list[int]], lengths: Any, size: tuple[int, int]
    ) -> None:
        num_rows, longest = size
        inside = numpy.arange(self._block_tokens)
        places = (carry[TABLES].cpu().numpy()[:, None] * self._block_tokens + inside).reshape(-1)
        seen = numpy.full((num_rows, longest), self._spare_place, numpy.int64)
        written = numpy.full(num_rows, self._spare_place, numpy.int64)
        first = 0
        for row, (start, _, num_blocks) in enumerate(rows):
            own = places[first : first + start + 1]
            seen[row, : start + 1], written[row] = own, own[-1]
            first += num_blocks * self._block_tokens
        # A row that sees nothing would be no number: those that are left over see one place.
        all_lengths = numpy.ones(num_rows, numpy.int64)
        all_lengths[: len(rows)] = lengths
        hidden = torch.from_numpy(numpy.arange(longest) >= all_lengths[:, None]).view(num_rows, 1, 1, longest)
        captured.seen.copy_(torch.from_numpy(seen.reshape(-1)))
        captured.written.copy_(torch.from_numpy(written))
        captured.mask.copy_(torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, float("-inf")))
        captured.ids[:, : len(rows)].copy_(carry["input_ids"])
        captured.positions[:, : len(rows)].copy_(carry["position_ids"])

    def _capture(self, num_rows: int, longest: int) -> _Captured:
        device = self._device
        ids, positions = (torch.zeros((1, num_rows), dtype=torch.int64, device=device) for _ in range(2))
        written = torch.full((num_rows,), self._spare_place, dtype=torch.int64, device=device)
        seen = torch.full((num_rows * longest,), self._spare_place, dtype=torch.int64, device=device)
        mask = torch.zeros((num_rows, 1, 1, longest), dtype=self._dtype, device=device)
        every = torch.arange(num_rows, device=device)
        group = OneToken(every, seen, numpy.full(num_rows, longest), longest)
        group.set_mask(mask)
        layout = StepLayout(written, [group], [])
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._forward(ids, positions, every, layout)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._forward(ids, positions, every, layout)
        return _Captured(graph, ids, positions, written, seen, mask, logits)


def _rounded_up(count: int, least: int) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (count - 1).bit_length())

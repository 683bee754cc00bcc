"""How a batch is cut into the micro-batches that follow one another through a pipeline. Pure."""

from __future__ import annotations

from typing import Final

#: Below this many rows a micro-batch costs more by its hop and its worse use of the cores than it gains.
_MIN_ROWS: Final = 4


def micro_batches(rows: int, num_stages: int, wanted: int) -> tuple[int, ...]:
    """Rows of each micro-batch, as equal as can be, the larger ones first.

    Args:
        rows: of the batch.
        num_stages: pipeline stages; one stage has no use for micro-batches.
        wanted: how many the model's author asks for; 0 leaves it to us: one per stage, while each has rows enough.
    """
    if num_stages == 1 or rows <= 1:
        return (rows,)
    number = min(wanted, rows) if wanted else max(1, min(num_stages, rows // _MIN_ROWS))
    share, rest = divmod(rows, number)
    return tuple(share + (1 if index < rest else 0) for index in range(number))

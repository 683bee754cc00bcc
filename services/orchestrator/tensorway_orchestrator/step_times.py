"""How long a step of so many rows takes on one group, learned from the steps that it has run. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: Weight that a sample keeps when the next one comes: the last 50 or so count.
_DECAY: Final = 0.98
#: Spread of the sizes seen (as a share of their mean) below which a slope would be noise.
_MIN_SPREAD: Final = 0.1


@dataclass(slots=True)
class StepTimes:
    """Least squares of `fixed + per_row x rows` over exponentially weighted samples."""

    num_samples: int = 0
    _weight: float = 0.0
    _rows: float = 0.0
    _time_s: float = 0.0
    _rows_squared: float = 0.0
    _rows_time: float = 0.0

    def observe(self, rows: int, step_s: float) -> None:
        self.num_samples += 1
        self._weight = self._weight * _DECAY + 1.0
        self._rows = self._rows * _DECAY + rows
        self._time_s = self._time_s * _DECAY + step_s
        self._rows_squared = self._rows_squared * _DECAY + rows * rows
        self._rows_time = self._rows_time * _DECAY + rows * step_s

    def predict_s(self, rows: float) -> float:
        """Expected step time; 0 while nothing is known. Where only one size was seen, larger ones scale up and smaller ones do not."""
        if not self._weight:
            return 0.0
        mean_rows = max(self._rows / self._weight, 1e-9)
        mean_s = self._time_s / self._weight
        variance = self._rows_squared / self._weight - mean_rows**2
        if variance < (_MIN_SPREAD * mean_rows) ** 2:
            return mean_s * max(1.0, rows / mean_rows)
        covariance = self._rows_time / self._weight - mean_rows * mean_s
        # Neither part of a step's time can be negative.
        per_row_s = min(max(0.0, covariance / variance), mean_s / mean_rows)
        return mean_s + per_row_s * (rows - mean_rows)

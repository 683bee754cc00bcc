"""How long a step of so many rows takes on one group, learned from the steps that it has run. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

#: Weight that a sample keeps when the next one comes: the last 50 or so count.
_DECAY: Final = 0.98
#: Spread of the sizes seen (as a share of their mean) below which a slope would be noise.
_MIN_SPREAD: Final = 0.1


@dataclass(slots=True)
class StepTimes:
    """Least squares of `fixed + per_row x rows` over exponentially weighted samples.

    The sums behind it add up, so the same class also holds what several groups have measured together (`absorb`, `expel`).
    """

    num_samples: int = 0
    _weight: float = 0.0
    _rows: float = 0.0
    _time_s: float = 0.0
    _rows_squared: float = 0.0
    _rows_time: float = 0.0
    #: The line through the samples, worked out when first asked for after a change.
    _is_fitted: bool = False
    _mean_rows: float = 0.0
    _mean_s: float = 0.0
    _per_row_s: float | None = None

    def observe(self, rows: int, step_s: float) -> None:
        self._is_fitted = False
        self.num_samples += 1
        self._weight = self._weight * _DECAY + 1.0
        self._rows = self._rows * _DECAY + rows
        self._time_s = self._time_s * _DECAY + step_s
        self._rows_squared = self._rows_squared * _DECAY + rows * rows
        self._rows_time = self._rows_time * _DECAY + rows * step_s

    def predict_s(self, rows: float) -> float:
        """Expected step time; 0 while nothing is known. Where only one size was seen, larger ones scale up and smaller ones do not."""
        if not self._is_fitted:
            self._fit()
        if self._per_row_s is None:
            return self._mean_s * max(1.0, rows / self._mean_rows) if self._mean_s else 0.0
        return self._mean_s + self._per_row_s * (rows - self._mean_rows)

    def least_s(self, rows: float) -> float:
        """Expected step time, or what is certain of it: where only one size was seen, larger ones take at least as long, and smaller ones
        at least their share. For those who would never see another size if they believed the worst of it."""
        predicted_s = self.predict_s(rows)
        if self._per_row_s is not None or not self._mean_s:
            return predicted_s
        return self._mean_s * min(1.0, rows / self._mean_rows)

    @property
    def knows_slope(self) -> bool:
        """Whether steps of different sizes were seen."""
        if not self._is_fitted:
            self._fit()
        return self._per_row_s is not None

    def least_worthwhile(self, max_rows: int, share: float) -> int:
        """The smallest batch that serves at least `share` of the rows a second that full ones do; half of `max_rows` while that is unknown,
        so that it becomes known."""
        full_s = self.predict_s(max_rows)
        if self._per_row_s is None or full_s <= 0.0:
            return max_rows if full_s <= 0.0 else max(1, max_rows // 2)
        fixed_s = max(0.0, full_s - self._per_row_s * max_rows)
        # rows / (fixed + per_row x rows) >= wanted
        wanted = share * max_rows / full_s
        return min(max_rows, max(1, math.ceil(wanted * fixed_s / max(1e-9, 1.0 - wanted * self._per_row_s) - 1e-6)))

    def absorb(self, other: StepTimes) -> None:
        """Adds what `other` knows."""
        self._add(other, 1.0)
        self.num_samples += other.num_samples

    def expel(self, other: StepTimes) -> None:
        """Takes out again what was absorbed from `other`, which must not have changed since."""
        self._add(other, -1.0)
        self.num_samples -= other.num_samples
        if self.num_samples <= 0:
            self.clear()  # what is left is rounding

    def seed(self, other: StepTimes, num_steps: float) -> None:
        """Begins anew from what `other` knows, which counts as `num_steps` samples: a first belief, outvoted by as many real steps."""
        self.clear()
        if other._weight > 0.0:
            self._add(other, min(1.0, num_steps / other._weight))

    def clear(self) -> None:
        """Forgets everything."""
        self.num_samples = 0
        self._weight = self._rows = self._time_s = self._rows_squared = self._rows_time = 0.0
        self._is_fitted = False

    def _add(self, other: StepTimes, share: float) -> None:
        self._is_fitted = False
        self._weight += share * other._weight
        self._rows += share * other._rows
        self._time_s += share * other._time_s
        self._rows_squared += share * other._rows_squared
        self._rows_time += share * other._rows_time

    def _fit(self) -> None:
        self._is_fitted = True
        self._per_row_s = None
        if self._weight <= 0.0:
            self._mean_rows = self._mean_s = 0.0
            return
        mean_rows = self._mean_rows = max(self._rows / self._weight, 1e-9)
        mean_s = self._mean_s = max(0.0, self._time_s / self._weight)
        variance = self._rows_squared / self._weight - mean_rows**2
        if variance >= (_MIN_SPREAD * mean_rows) ** 2:
            covariance = self._rows_time / self._weight - mean_rows * mean_s
            # Neither part of a step's time can be negative.
            self._per_row_s = min(max(0.0, covariance / variance), mean_s / mean_rows)

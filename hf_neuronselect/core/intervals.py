"""Means, differences and AUCs with 95 % intervals from resampled values, and balanced accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

RESAMPLES = 2000
LOW, HIGH = 2.5, 97.5
_SEED = 0


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval, the percentiles of what was drawn; None where there are too few values to tell."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, resampled: np.ndarray) -> Self:
        low, high = np.percentile(resampled, [LOW, HIGH]).tolist()
        return cls(float(value), float(low), float(high))

    def told(self, form: str = ".2f") -> str:
        """``4.39 (4.01 to 4.77)``; "" of no value."""
        if self.value is None:
            return ""
        if self.low is None or self.high is None:
            return f"{self.value:{form}}"
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"


def mean_of(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean; its interval from 2 values on."""
    given = np.asarray(values, np.float64)
    if len(given) < 2:
        return Interval(float(given[0]) if len(given) else None)
    return Interval.of(given.mean(), _resampled(given))


def difference_of(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> Interval:
    """The mean of one sample minus that of another; each is resampled by itself."""
    first, second = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if min(len(first), len(second)) < 2:
        return Interval(None)
    drawn = _resampled(first) - _resampled(second, _SEED + 1)
    return Interval.of(first.mean() - second.mean(), drawn)


def paired_difference_of(one: np.ndarray, others: np.ndarray) -> Interval:
    """The mean of a row's value minus the mean of its values in several draws; rows and draws are resampled.

    Args:
        one: float64 ``[n]``. others: float64 ``[draws, n]``.
    """
    if one.shape[0] < 2:
        return Interval(None)
    draw = np.random.default_rng(_SEED)
    rows = draw.integers(len(one), size=(RESAMPLES, len(one)))
    draws = draw.integers(len(others), size=(RESAMPLES, len(others)))
    drawn = np.asarray([one[i].mean() - others[j][:, i].mean() for i, j in zip(rows, draws, strict=True)])
    return Interval.of(one.mean() - others.mean(), drawn)


def auc_of(high: Sequence[float] | np.ndarray, low: Sequence[float] | np.ndarray) -> Interval:
    """The chance that a value of one sample is above one of the other, ties half; both are resampled."""
    first, second = np.asarray(high, np.float64), np.asarray(low, np.float64)
    if min(len(first), len(second)) < 2:
        return Interval(None)
    wins = (first[:, None] > second) + 0.5 * (first[:, None] == second)
    draw = np.random.default_rng(_SEED)
    rows = draw.integers(len(first), size=(RESAMPLES, len(first)))
    columns = draw.integers(len(second), size=(RESAMPLES, len(second)))
    return Interval.of(wins.mean(), np.asarray([wins[i][:, j].mean() for i, j in zip(rows, columns, strict=True)]))


def balanced_accuracy_of(fires: Sequence[bool] | np.ndarray, silent: Sequence[bool] | np.ndarray) -> Interval:
    """The mean of two shares: of yes where yes is right, and of no where no is.

    Both are drawn from Jeffreys' posterior of a share: resampled answers that all agree would leave an interval without width.

    Args:
        fires, silent: whether the answer was yes, where yes is right, and where no is.
    """
    right = [int(np.sum(fires)), int(np.sum(~np.asarray(silent, bool)))]
    if not len(fires) or not len(silent):
        return Interval(None)
    draw = np.random.default_rng(_SEED)
    shares = [
        draw.beta(k + 0.5, n - k + 0.5, 10 * RESAMPLES) for k, n in zip(right, (len(fires), len(silent)), strict=True)
    ]
    value = (right[0] / len(fires) + right[1] / len(silent)) / 2
    low, high = np.percentile(np.mean(shares, axis=0), [LOW, HIGH]).tolist()
    return Interval(value, min(low, value), max(high, value))  # of answers that are all right, the end is 1


def _resampled(values: np.ndarray, seed: int = _SEED) -> np.ndarray:
    """Means of so many samples drawn with replacement: float64 ``[RESAMPLES]``."""
    draw = np.random.default_rng(seed)
    return values[draw.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)

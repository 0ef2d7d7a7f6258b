"""Random rows: the control that every table needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.options import opt
from ..signals.columns import RowBatch
from .base import Method, Target, register_method
from .why import Why


@register_method
@dataclass(frozen=True)
class Random(Method):
    """A uniform number in [0, 1) keyed by (seed, row number), never by call order."""

    name = "random"
    needs_target = False
    grades = False

    seed: int = opt(0, "Another seed, another draw.", minimum=0)

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return uniform(self.seed, rows.index)

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        drawn = float(self.score(row, target)[0])
        return Why(f"{drawn:.4f} was drawn from seed {self.seed} and the row's number; its text does not count")


def uniform(seed: int, rows: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each row number: splitmix64 of it, from a start that is itself splitmix64 of the seed."""
    start = _splitmix64(np.asarray([seed], dtype=np.uint64))
    bits = _splitmix64(start + rows.astype(np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def gumbel(seed: int, rows: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise for each row number, ``-log(-log u)``: float64 ``[n]``.

    Rows with the largest ``log w + noise`` are a draw without replacement by the weights w.
    """
    return -np.log(-np.log(np.maximum(uniform(seed, rows), 2.0**-54)))


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that looks random (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

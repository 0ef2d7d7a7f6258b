"""Cosine of a row's embedding to the exemplars', shared by the methods that read one (DLRDS of MoNA's paper)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..core.options import opt
from ..signals.columns import RowBatch
from .base import Method, Target


@dataclass(frozen=True)
class EmbeddingMethod(Method):
    """Cosine of a row's embedding to the exemplars': to their mean, or to each."""

    exemplars: Literal["mean", "each"] = opt(
        "mean", "mean: one cosine, to the exemplars' mean; each: one to every exemplar, of which the best counts."
    )

    def fit(self, exemplars: RowBatch) -> Target:
        """``prototype``: float64 ``[width]``, or ``[exemplars, width]``."""
        vectors = exemplars.dense(self.signals[0]).astype(np.float64)
        return {"prototype": vectors.mean(axis=0) if self.exemplars == "mean" else vectors}

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return cosines(rows.dense(self.signals[0]).astype(np.float64), target["prototype"])


def cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosine of each row to one vector ``[width]``, or to each of several; 0 where either is zero."""
    # each sum by itself: a matrix product rounds by the size of the batch
    dots = np.stack([(rows * other).sum(axis=1) for other in np.atleast_2d(others)], axis=1)
    scale = np.sqrt((rows * rows).sum(axis=1)[:, None] * (np.atleast_2d(others) ** 2).sum(axis=1)[None, :])
    found = np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)
    return found[:, 0] if others.ndim == 1 else found

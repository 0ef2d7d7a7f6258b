"""Cosine of a row's embedding to the mean of the exemplars', shared by the methods that read one (DLRDS of MoNA's paper)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..signals.columns import RowBatch
from .base import Method, Scorer, Target


@dataclass(frozen=True)
class EmbeddingMethod(Method):
    """Cosine of a row's embedding to the mean of the exemplars'."""

    def fit(self, exemplars: RowBatch) -> Target:
        """``prototype``: float64 ``[width]``."""
        return {"prototype": exemplars.dense(self.signals[0]).astype(np.float64).mean(axis=0)}

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return self.scorer({"target": target})(rows)["target"]

    def scorer(self, targets: Mapping[str, Target]) -> Scorer:
        prototypes = np.stack([target["prototype"] for target in targets.values()])
        centre = next(iter(targets.values())).get("centre")  # of the pool: the same in all
        prototypes = prototypes if centre is None else prototypes - centre

        def score(rows: RowBatch) -> dict[str, np.ndarray]:
            vectors = rows.dense(self.signals[0]).astype(np.float64)
            found = cosines(vectors if centre is None else vectors - centre, prototypes)
            return {name: found[:, i] for i, name in enumerate(targets)}

        return score


def cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosine of each row to each of several vectors: ``[n, width], [m, width]`` -> ``[n, m]``; 0 where either is zero."""
    # each sum by itself: a matrix product rounds by the size of the batch
    dots = np.stack([(rows * other).sum(axis=1) for other in others], axis=1)
    scale = np.sqrt((rows * rows).sum(axis=1)[:, None] * (others * others).sum(axis=1)[None, :])
    return np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)

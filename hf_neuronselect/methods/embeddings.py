"""Cosine of a row's embedding to the mean of the exemplars', shared by the methods that read one (DLRDS of MoNA's paper)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..signals.columns import RowBatch
from .base import Method, Scorer, Target
from .why import Why


@dataclass(frozen=True)
class EmbeddingMethod(Method):
    """Cosine of a row's embedding to the mean of the exemplars'."""

    prototype = "prototype"
    tells_exemplars = True

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

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """Each exemplar's share of the cosine to their mean: ``x . e_i / (n |x| |mean|)``, which add up to it."""
        score = float(self.score(row, target)[0])
        says = f"the cosine to the exemplars' mean is {score:.4f}"
        if exemplars is None:
            return Why(f"{says}; which exemplar is nearest can be said where the exemplars are given")
        centre = target.get("centre", 0.0)
        own = row.dense(self.signals[0]).astype(np.float64)[0] - centre
        others = exemplars.dense(self.signals[0]).astype(np.float64) - centre
        scale = np.linalg.norm(own) * np.linalg.norm(target["prototype"] - centre) * len(others)
        parts = others @ own / scale if scale > 0 else np.zeros(len(others))
        near = cosines(own[None], others)[0]
        says = f"{says}; exemplar {exemplars.index[near.argmax()]} is nearest (cosine {near.max():.4f})"
        return Why.of(says, "exemplar", parts, ids=exemplars.index, facts={"cosine": near})


def cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosine of each row to each of several vectors: ``[n, width], [m, width]`` -> ``[n, m]``; 0 where either is zero."""
    # each sum by itself: a matrix product rounds by the size of the batch
    dots = np.stack([(rows * other).sum(axis=1) for other in others], axis=1)
    scale = np.sqrt((rows * rows).sum(axis=1)[:, None] * (others * others).sum(axis=1)[None, :])
    return np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)

"""Similarity of pooled features to a target's prototype, shared by the prototype methods.

Rows are sparse and nonnegative; only their nonzeros are touched (methods.md 1.4).
"""

from __future__ import annotations

import numpy as np

from ..errors import one_of
from ..features.columns import FeatureBatch, SparseRows
from .base import Method, Target

METRICS = ("jaccard", "cosine", "euclidean")


def prototype(rows: SparseRows) -> np.ndarray:
    """Mean of the rows: float64 ``[largest latent + 1]``; later latents are 0."""
    width = int(rows.indices.max()) + 1 if len(rows.indices) else 1
    total = np.zeros(width)
    np.add.at(total, rows.indices, rows.values.astype(np.float64))
    return total / len(rows)


def _gather(rows: SparseRows, proto: np.ndarray) -> np.ndarray:
    """The prototype at each nonzero of the rows."""
    inside = rows.indices < len(proto)
    return np.where(inside, proto[np.where(inside, rows.indices, 0)], 0.0)


def similarity(rows: SparseRows, proto: np.ndarray, metric: str) -> np.ndarray:
    """Similarity of each row to the prototype.

    * ``jaccard``: ``J = m / (S + T - m)`` with ``m = sum min`` over the row's support, ``S`` and ``T`` the
      sums of row and prototype; J(0, 0) = 0 (MoNA, eq. 8).
    * ``cosine``; 0 where either is zero.
    * ``euclidean``: minus the distance.

    Returns:
        float64 ``[n]``.
    """
    values, target = rows.values.astype(np.float64), _gather(rows, proto)
    if metric == "jaccard":
        shared, own = rows.sum(np.minimum(values, target)), rows.sum(values)
        union = own + proto.sum() - shared
        return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    squares, norm = rows.sum(values * values), float(proto @ proto)
    dot = rows.sum(values * target)
    if metric == "cosine":
        scale = np.sqrt(squares * norm)
        return np.divide(dot, scale, out=np.zeros_like(dot), where=scale > 0)
    return -np.sqrt(np.maximum(squares - 2 * dot + norm, 0.0))


class SparsePrototypeMethod(Method):
    """Similarity of a sparse feature to the mean of the exemplars' (MoNA and its comparison).

    Args:
        metric: ``jaccard`` (the paper), ``cosine`` or ``euclidean``.
    """

    column: str

    def __init__(self, metric: str = "jaccard") -> None:
        self.metric = one_of(metric, METRICS, "metric")
        self.features = (self.column,)

    def fit(self, exemplars: FeatureBatch) -> Target:
        return {"prototype": prototype(exemplars.sparse(self.column))}

    def score(self, batch: FeatureBatch, target: Target) -> np.ndarray:
        return similarity(batch.sparse(self.column), target["prototype"], self.metric)

    def explain(self, batch: FeatureBatch, target: Target) -> list[dict[str, np.ndarray]]:
        """Each latent's share of the overlap ``sum min(z, z_target)``; the shares of a row sum to 1."""
        rows, proto, found = batch.sparse(self.column), target["prototype"], []
        at_nonzeros = _gather(rows, proto)
        for i in range(len(rows)):
            latents, values = rows.row(i)
            of_target = at_nonzeros[rows.indptr[i] : rows.indptr[i + 1]]
            overlap = np.minimum(values.astype(np.float64), of_target)
            order = np.argsort(-overlap, kind="stable")[: int((overlap > 0).sum())]
            found.append(
                {
                    "latent": latents[order],
                    "value": values[order].astype(np.float64),
                    "target": of_target[order],
                    "share": overlap[order] / max(overlap.sum(), np.finfo(float).tiny),
                }
            )
        return found

"""Similarity of pooled latents to a target's prototype, shared by the prototype methods.

Rows are sparse and nonnegative; only their nonzeros are touched (methods.md 1.4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ..core.options import opt
from ..signals.columns import RowBatch, SparseRows
from .base import Method, Scorer, Target
from .why import Why


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


class LatentMeans:
    """The mean of each latent over rows that come in batches."""

    def __init__(self) -> None:
        self.total: np.ndarray = np.zeros(1)
        self.rows = 0

    def add(self, rows: SparseRows) -> None:
        self.rows += len(rows)
        wider = int(rows.indices.max(initial=0)) + 1 - len(self.total)
        self.total = np.pad(self.total, (0, max(0, wider)))
        np.add.at(self.total, rows.indices, rows.values.astype(np.float64))

    def means(self) -> np.ndarray:
        """float64 ``[largest latent + 1]``; later latents are 0."""
        return self.total / max(1, self.rows)


def above(rows: SparseRows, centre: np.ndarray) -> SparseRows:
    """What lies above the centre: ``max(z - centre, 0)``, float64."""
    return SparseRows(
        rows.indptr, rows.indices, np.maximum(rows.values.astype(np.float64) - _gather(rows, centre), 0.0)
    )


class Prototypes:
    """The prototypes of several targets as one table: a row's nonzeros are looked up once for all of them.

    Args:
        vectors: float64 ``[width]`` each; latents beyond a vector's width are 0.

    Attributes:
        table: float64 ``[largest width, targets]``, C order.
        sums, squares: float64 ``[targets]``, of each vector.
    """

    def __init__(self, vectors: Sequence[np.ndarray]) -> None:
        self.table = np.zeros((max(map(len, vectors)), len(vectors)))
        for i, vector in enumerate(vectors):
            self.table[: len(vector), i] = vector
        self.sums = np.asarray([vector.sum() for vector in vectors])
        self.squares = np.asarray([vector @ vector for vector in vectors])


def similarity(rows: SparseRows, prototypes: Prototypes, metric: str) -> np.ndarray:
    """Similarity of each row to each prototype, in one sweep over the rows' nonzeros.

    * ``jaccard``: ``J = m / (S + T - m)`` with ``m = sum min`` over the row's support, ``S`` and ``T`` the
      sums of row and prototype; J(0, 0) = 0 (MoNA, eq. 8).
    * ``cosine``; 0 where either is zero.
    * ``euclidean``: minus the distance.

    Returns:
        float64 ``[n, targets]``; NaN where the row or the prototype has a value that is not finite.
    """
    from ..signals.kernels import overlaps, products  # numba is loaded only where rows are scored

    jaccard = metric == "jaccard"
    shared, own = (overlaps if jaccard else products)(rows, prototypes.table)
    of_row, of_target = own[:, None], prototypes.sums if jaccard else prototypes.squares
    with np.errstate(invalid="ignore"):
        if metric == "euclidean":
            scores = -np.sqrt(np.maximum(of_row - 2 * shared + of_target, 0.0))
        else:
            scale = of_row + of_target - shared if jaccard else np.sqrt(of_row * of_target)
            scores = np.divide(shared, scale, out=np.zeros_like(shared), where=scale > 0)
    return np.where(np.isfinite(of_row) & np.isfinite(of_target), scores, np.nan)


@dataclass(frozen=True)
class SparsePrototypeMethod(Method):
    """Similarity of a sparse signal to the mean of the exemplars' (MoNA and its comparison)."""

    unit: ClassVar[str] = "feature"
    prototype = "prototype"
    tells_exemplars = True

    metric: Literal["jaccard", "cosine", "euclidean"] = opt("jaccard", "Similarity; jaccard is the paper's.")

    def fit(self, exemplars: RowBatch) -> Target:
        return {"prototype": prototype(exemplars.sparse(self.signals[0]))}

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return self.scorer({"target": target})(rows)["target"]

    def rows_of(self, rows: RowBatch, target: Target) -> SparseRows:
        """The rows as they are compared with the prototype."""
        return rows.sparse(self.signals[0])

    def scorer(self, targets: Mapping[str, Target]) -> Scorer:
        prototypes = Prototypes([target["prototype"] for target in targets.values()])
        any_target = next(iter(targets.values()))  # what rows_of needs is the same in all

        def score(rows: RowBatch) -> dict[str, np.ndarray]:
            scores = similarity(self.rows_of(rows, any_target), prototypes, self.metric)
            return {name: np.ascontiguousarray(scores[:, i]) for i, name in enumerate(targets)}

        return score

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """The units' shares of the sum that the similarity is made from (the numerator of eq. 8).

        Jaccard: ``min(z, z_target)``; cosine: ``z z_target``. A distance has no such parts.
        """
        sparse, proto = self.rows_of(row, target), target["prototype"]
        units, values = sparse.row(0)[0], sparse.values.astype(np.float64)
        of_target = _gather(sparse, proto)
        score = float(similarity(sparse, Prototypes([proto]), self.metric)[0, 0])
        if self.metric == "euclidean":
            return Why(f"minus the distance to the exemplars' mean, {-score:.4g}; a distance has no parts that add up")
        amounts = np.minimum(values, of_target) if self.metric == "jaccard" else values * of_target
        if self.metric == "jaccard":
            union = values.sum() + proto.sum() - amounts.sum()
            says = f"{score:.4f} = {amounts.sum():.4g} shared with the exemplars' mean / {union:.4g} in either"
        else:
            says = f"the cosine to the exemplars' mean is {score:.4f}"
        facts = {"value": values, "target": of_target}
        return Why.of(says, self.unit, amounts, ids=units, facts=facts, signal=str(self.signals[0]))

"""Each exemplar shares itself out among its nearest rows (TSDS, arXiv 2410.11303; in arXiv 2602.14696)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.errors import NeuronSelectError
from ..core.options import opt
from .base import Picker, best_first, register_picker, row_scores, table_of, then
from .vectors import Vectors


@register_picker
@dataclass(frozen=True)
class Knn(Picker):
    """Each exemplar gives its nearest rows equal shares; rows with the largest sum come first, ties by their best score.

    The paper draws rows by these shares; here the largest are taken (choice). Rows that are nobody's neighbour follow by
    their best score.
    """

    name = "knn"
    paper = "arXiv:2410.11303"
    each = True

    neighbours: int = opt(100, "Nearest rows of an exemplar that get a share.", unit="rows", minimum=1)

    def order(
        self, scores: np.ndarray, valid: np.ndarray, wanted: int | None = None, vectors: Vectors | None = None
    ) -> np.ndarray:
        table = table_of(scores)
        nearest = [best_first(table[:, i], valid)[: self.neighbours] for i in range(table.shape[1])]
        share = np.zeros(len(table))
        for rows, part in zip(nearest, self.parts(nearest, vectors), strict=True):
            share[rows] += part
        best = row_scores(scores)
        some = np.flatnonzero(share)
        return then(some[np.lexsort((some, -best[some], -share[some]))], best_first(best, valid))

    def parts(self, nearest: list[np.ndarray], vectors: Vectors | None) -> list[np.ndarray]:
        """What each exemplar gives its neighbours: shares that sum to 1."""
        return [np.full(len(rows), 1 / max(1, len(rows))) for rows in nearest]


@register_picker
@dataclass(frozen=True)
class Kde(Knn):
    """As ``knn``, with less for rows in a crowd: shares go by 1 / density, so that near-copies share one place.

    The density of a row is ``sum max(0, 1 - d^2 / width^2)`` over all neighbours of any exemplar, itself included, with
    ``d^2 = 2 - 2 cosine``.
    """

    name = "kde"
    vectors = True

    width: float = opt(0.5, "Distance (of vectors of length 1) at which rows no longer crowd each other.")
    by: str | None = opt(None, "Signal whose vectors are compared; default the method's own.")

    def check(self) -> None:
        super().check()
        if not self.width > 0:
            raise NeuronSelectError("must be above 0", option="width", value=self.width)

    def parts(self, nearest: list[np.ndarray], vectors: Vectors | None) -> list[np.ndarray]:
        assert vectors is not None
        rows = np.unique(np.concatenate(nearest))
        density = np.zeros(len(rows))
        for start in range(0, len(rows), 1024):
            apart = 2 - 2 * vectors.cosines(rows[start : start + 1024], rows)
            density[start : start + 1024] = np.maximum(0.0, 1 - np.maximum(apart, 0.0) / self.width**2).sum(axis=1)
        found = []
        for one in nearest:
            weight = 1 / np.maximum(density[np.searchsorted(rows, one)], 1e-9)
            found.append(weight / weight.sum())
        return found

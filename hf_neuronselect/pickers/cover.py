"""Rows that bring a feature which no row taken has (arXiv 2502.14050)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.errors import NeuronSelectError
from ..core.options import opt
from .base import Picker, best_first, register_picker, row_scores
from .vectors import Vectors


@register_picker
@dataclass(frozen=True)
class Cover(Picker):
    """In the order of the scores, a row is taken if it has a feature that is not covered yet; then another round begins.

    A row has the features of its sparse vector that are among the pool's strongest values: above the quantile
    ``strong`` of all nonzero values. Each round covers anew. The paper's steps are not published: choice.
    """

    name = "cover"
    paper = "arXiv:2502.14050"
    vectors = True

    strong: float = opt(0.9, "Quantile of the pool's nonzero values above which a row has the feature.")
    by: str | None = opt(None, "Signal whose features are covered; default the method's own.")

    def check(self) -> None:
        super().check()
        if not 0 <= self.strong < 1:
            raise NeuronSelectError("must lie in [0, 1)", option="strong", value=self.strong)

    def order(
        self, scores: np.ndarray, valid: np.ndarray, wanted: int | None = None, vectors: Vectors | None = None
    ) -> np.ndarray:
        assert vectors is not None
        if vectors.sparse is None:
            raise NeuronSelectError("needs features, a sparse signal: by=mona or by=polysemantic", option="picker",
                                    value=self.name)  # fmt: skip
        left = best_first(row_scores(scores), valid)
        features = vectors.row(left)
        bar = float(np.quantile(features.values, self.strong)) if len(features.values) else 0.0
        of_row = [features.row(i)[0][features.row(i)[1] > bar] for i in range(len(left))]
        width = int(features.indices.max(initial=0)) + 1
        taken: list[int] = []
        waiting = list(range(len(left)))
        while waiting and (wanted is None or len(taken) < wanted):
            covered = np.zeros(width, dtype=bool)
            passed: list[int] = []
            for i in waiting:
                if (~covered[of_row[i]]).any():
                    covered[of_row[i]] = True
                    taken.append(i)
                else:
                    passed.append(i)
            if len(passed) == len(waiting):  # none of those left has a feature
                break
            waiting = passed
        rest = np.setdiff1d(np.arange(len(left)), np.asarray(taken, dtype=np.int64))
        return left[np.concatenate([np.asarray(taken, dtype=np.int64), rest])]

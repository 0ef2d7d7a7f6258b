"""The largest score first: to the exemplars as a whole, or to the nearest of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .base import Picker, best_first, register_picker, row_scores
from .vectors import Vectors


@register_picker
@dataclass(frozen=True)
class BestFirst(Picker):
    """The largest score first."""

    name = "best-first"

    def order(
        self, scores: np.ndarray, valid: np.ndarray, wanted: int | None = None, vectors: Vectors | None = None
    ) -> np.ndarray:
        return best_first(row_scores(scores), valid)


@register_picker
@dataclass(frozen=True)
class GlobalMax(BestFirst):
    """The largest score to any exemplar first (RDS+'s large-pool script, arXiv 2503.01807; "doubly greedy" in arXiv 2602.14696)."""

    name = "global-max"
    paper = "arXiv:2503.01807"
    each = True

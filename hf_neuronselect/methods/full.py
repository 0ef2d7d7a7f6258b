"""The whole pool, in its order."""

from __future__ import annotations

import numpy as np

from ..core.provenance import Budget
from ..signals.columns import RowBatch
from .base import Method, Target, register_method
from .why import Why


@register_method
class Full(Method):
    """Every row scores 0; with its default ratio of 1 all are kept."""

    name = "full"
    needs_target = False
    grades = False
    default_budget = Budget(ratio=1.0)

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return np.zeros(len(rows))

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        return Why("every row scores 0 and is kept")

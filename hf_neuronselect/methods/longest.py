"""Longest and shortest rows: length confounds every method."""

from __future__ import annotations

import numpy as np

from ..signals.columns import RowBatch
from .base import Method, Target, register_method
from .why import Why


@register_method
class Longest(Method):
    """Tokens fed to the model."""

    name = "longest"
    signals = ("tokens",)
    needs_target = False
    grades = False

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return rows["n_tokens"].astype(np.float64)

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        return Why(f"the row has {int(row['n_tokens'][0])} tokens; nothing else counts")


@register_method
class Shortest(Method):
    """Minus the tokens fed to the model."""

    name = "shortest"
    signals = ("tokens",)
    needs_target = False
    grades = False

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return -rows["n_tokens"].astype(np.float64)

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        return Why(f"the row has {int(row['n_tokens'][0])} tokens, and few count; nothing else does")

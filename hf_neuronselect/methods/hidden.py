"""Hidden states without an SAE: MoNA's "w/o SAE" row (arXiv 2503.15573; DLRDS-LLM)."""

from __future__ import annotations

import numpy as np

from ..signals.columns import RowBatch
from .base import Method, Target, register_method


@register_method
class Hidden(Method):
    """Cosine of the mean hidden state to the exemplars' mean (the paper leaves the metric open: choice)."""

    name = "hidden"
    paper = "arXiv:2503.15573"
    signals = ("hidden",)

    def fit(self, exemplars: RowBatch) -> Target:
        return {"prototype": exemplars.dense("hidden").astype(np.float64).mean(axis=0)}

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        vectors, proto = rows.dense("hidden").astype(np.float64), target["prototype"]
        scale = np.sqrt((vectors * vectors).sum(axis=1) * (proto * proto).sum())
        dot = (vectors * proto).sum(axis=1)
        return np.divide(dot, scale, out=np.zeros_like(dot), where=scale > 0)

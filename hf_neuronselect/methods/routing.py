"""Routing weights of mixture-of-experts models (MoNA, section 3.6; OLMoE-1B-7B)."""

from __future__ import annotations

import numpy as np

from ..signals.columns import RowBatch
from .base import Method, Target, register_method


@register_method
class Routing(Method):
    """Generalized Jaccard of the blocks' mean routing weights over all experts to the exemplars' mean."""

    name = "routing"
    paper = "arXiv:2503.15573 section 3.6"
    signals = ("routing",)

    def fit(self, exemplars: RowBatch) -> Target:
        return {"prototype": exemplars.dense("routing").astype(np.float64).mean(axis=0)}

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        weights, proto = rows.dense("routing").astype(np.float64), target["prototype"]
        union = np.maximum(weights, proto).sum(axis=1)
        shared = np.minimum(weights, proto).sum(axis=1)
        return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)

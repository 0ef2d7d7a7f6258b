"""Routing weights of mixture-of-experts models (MoNA, section 3.6; OLMoE-1B-7B)."""

from __future__ import annotations

import numpy as np

from ..signals.columns import RowBatch
from .base import Method, Target, register_method
from .why import Why


@register_method
class Routing(Method):
    """Generalized Jaccard of the blocks' mean routing weights over all experts to the exemplars' mean."""

    name = "routing"
    paper = "arXiv:2503.15573 section 3.6"
    signals = ("routing",)
    prototype = "prototype"

    def fit(self, exemplars: RowBatch) -> Target:
        return {"prototype": exemplars.dense("routing").astype(np.float64).mean(axis=0)}

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        weights, proto = rows.dense("routing").astype(np.float64), target["prototype"]
        union = np.maximum(weights, proto).sum(axis=1)
        shared = np.minimum(weights, proto).sum(axis=1)
        return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """Each expert's share of the sum that the similarity is made from."""
        weights, proto = row.dense("routing")[0].astype(np.float64), target["prototype"]
        shared, union = np.minimum(weights, proto), np.maximum(weights, proto).sum()
        says = f"{shared.sum() / max(union, 1e-30):.4f} = {shared.sum():.4g} shared with the exemplars' mean / {union:.4g} in either"
        return Why.of(says, "expert", shared, facts={"value": weights, "target": proto})

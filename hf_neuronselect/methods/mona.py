"""MoNA (arXiv 2503.15573): similarity of monosemantic activations to the target's prototype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..core.options import opt
from ..signals.columns import RowBatch, SparseRows
from .base import PoolMethod, Target, register_method
from .prototype import LatentMeans, SparsePrototypeMethod, above


@register_method
@dataclass(frozen=True)
class Mona(SparsePrototypeMethod, PoolMethod):
    """Generalized Jaccard of mean-pooled top-K SAE latents to the exemplars' mean (eq. 6-8), top 5 %.

    K, layer, SAE and pooled tokens belong to the extractor; the paper's are K = 192, layer -2 and
    EleutherAI/sae-llama-3-8b-32x on Meta-Llama-3-8B.
    """

    name = "mona"
    paper = "arXiv:2503.15573"
    signals = ("mona",)

    centre: Literal["none", "pool"] = opt(
        "none", "pool: of each latent counts what lies above the pool's mean, in rows and prototype (ours)."
    )

    @property
    def observes(self) -> bool:
        return self.centre == "pool"

    def start(self) -> LatentMeans:
        return LatentMeans()

    def observe(self, state: LatentMeans, rows: RowBatch) -> None:
        state.add(rows.sparse("mona"))

    def finish(self, state: LatentMeans, targets: Mapping[str, Target]) -> Mapping[str, Target]:
        """``prototype``, what of it lies above ``centre``, the pool's mean."""
        found, centre = {}, state.means()
        for name, target in targets.items():
            proto = target["prototype"]
            of_pool = np.pad(centre, (0, max(0, len(proto) - len(centre))))[: len(proto)]
            found[name] = {"prototype": np.maximum(proto - of_pool, 0.0), "centre": centre}
        return found

    def rows_of(self, rows: RowBatch, target: Target) -> SparseRows:
        sparse = super().rows_of(rows, target)
        return above(sparse, target["centre"]) if "centre" in target else sparse

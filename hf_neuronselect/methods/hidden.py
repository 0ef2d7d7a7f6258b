"""Hidden states without an SAE: MoNA's "w/o SAE" row (arXiv 2503.15573; DLRDS-LLM)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..core.options import opt
from ..signals.columns import RowBatch
from .base import PoolMethod, Target, register_method
from .embeddings import EmbeddingMethod


@register_method
@dataclass(frozen=True)
class Hidden(EmbeddingMethod, PoolMethod):
    """Cosine of the mean hidden state to the exemplars' mean (the paper leaves the metric open: choice)."""

    name = "hidden"
    paper = "arXiv:2503.15573"
    signals = ("hidden",)

    centre: Literal["none", "pool"] = opt(
        "none",
        "pool: the pool's mean is taken off rows and prototype first (ours), so that what all rows share is gone.",
    )

    @property
    def observes(self) -> bool:
        return self.centre == "pool"

    def start(self) -> list[np.ndarray]:
        return []  # one sum and count a batch

    def observe(self, state: list[np.ndarray], rows: RowBatch) -> None:
        vectors = rows.dense("hidden")
        state.append(np.append(vectors.sum(axis=0, dtype=np.float64), len(vectors)))

    def finish(self, state: list[np.ndarray], targets: Mapping[str, Target]) -> Mapping[str, Target]:
        if not state:
            return targets
        total = np.sum(state, axis=0)
        return {name: {**target, "centre": total[:-1] / total[-1]} for name, target in targets.items()}

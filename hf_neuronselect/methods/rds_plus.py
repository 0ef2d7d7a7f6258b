"""RDS+ (arXiv 2503.01807): rows near single exemplars, which take turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..core.options import opt
from ..signals.columns import RowBatch
from .base import Method, Target, register_method
from .embeddings import cosines
from .pickers import BestFirst, Picker, RoundRobin


@register_method
@dataclass(frozen=True)
class RdsPlus(Method):
    """Cosine of a row's position-weighted mean hidden state to each exemplar's; exemplars in turn take their best row.

    The paper keeps 10,000 rows of some millions; the share kept by default is ours. Its authors strip the text, so that no
    line break follows the last turn; here a row's tokens are those of the chat template (choice).
    """

    name = "rds-plus"
    paper = "arXiv:2503.01807"
    signals = ("rds_plus",)

    exemplars: Literal["each", "mean"] = opt(
        "each", "each: the exemplars take turns, the paper's way; mean: one cosine, to the exemplars' mean."
    )

    def fit(self, exemplars: RowBatch) -> Target:
        """``prototype``: float64 ``[exemplars, d]``, or ``[d]``."""
        vectors = exemplars.dense("rds_plus").astype(np.float64)
        return {"prototype": vectors.mean(axis=0) if self.exemplars == "mean" else vectors}

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return cosines(rows.dense("rds_plus").astype(np.float64), target["prototype"])

    def picker(self) -> Picker:
        return RoundRobin() if self.exemplars == "each" else BestFirst()

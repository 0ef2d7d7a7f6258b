"""Best first, but none too near to one that is taken (DEITA, arXiv 2312.15685)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.errors import NeuronSelectError
from ..core.options import opt
from .base import Picker, best_first, register_picker, row_scores, then
from .vectors import Vectors

_BLOCK = 128


@register_picker
@dataclass(frozen=True)
class Diverse(Picker):
    """In the order of the scores, a row is passed over if its cosine to one that is taken is above ``cosine``.

    Rows that were passed over follow, by their scores, where too few are left.
    """

    name = "diverse"
    paper = "arXiv:2312.15685"
    vectors = True

    cosine: float = opt(0.9, "Largest cosine to a row that is taken.")
    by: str | None = opt(None, "Signal whose vectors are compared; default the method's own.")

    def check(self) -> None:
        super().check()
        if not -1 <= self.cosine < 1:
            raise NeuronSelectError("must lie in [-1, 1)", option="cosine", value=self.cosine)

    def order(
        self, scores: np.ndarray, valid: np.ndarray, wanted: int | None = None, vectors: Vectors | None = None
    ) -> np.ndarray:
        assert vectors is not None
        rows = best_first(row_scores(scores), valid)
        taken: list[int] = []
        for start in range(0, len(rows), _BLOCK):
            if wanted is not None and len(taken) >= wanted:
                break
            block = rows[start : start + _BLOCK]
            free = np.ones(len(block), dtype=bool)
            for before in range(0, len(taken), 4096):
                free &= (vectors.cosines(block, np.asarray(taken[before : before + 4096])) <= self.cosine).all(axis=1)
            block = block[free]
            near = vectors.cosines(block, block) > self.cosine
            kept: list[int] = []
            for i in range(len(block)):
                if not near[i, kept].any():
                    kept.append(i)
            taken += block[kept].tolist()
        return then(np.asarray(taken, dtype=np.int64), rows)

"""Rows by the mass that unbalanced optimal transport brings them from the exemplars (arXiv 2602.14696)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.errors import NeuronSelectError
from ..core.options import opt
from .base import Picker, best_first, register_picker, row_scores, table_of, then
from .vectors import Vectors


@register_picker
@dataclass(frozen=True)
class Transport(Picker):
    """Exemplars send equal masses to rows, which had equal masses before; rows that receive most come first.

    Entropic unbalanced optimal transport by POT. Choices: costs are the scores turned round and scaled to [0, 1]; all that
    exemplars have is sent, while rows may get more or less than their part, at a price of ``relax`` times the
    Kullback-Leibler divergence. Ties by the best score.
    """

    name = "transport"
    paper = "arXiv:2602.14696"
    each = True
    libraries = ("ot",)

    blur: float = opt(0.05, "Weight of the entropy: less is sharper and slower.")
    relax: float = opt(0.1, "Price of giving rows unequal masses: more spreads the picks.")
    candidates: int = opt(20_000, "Only the rows with the best scores take part.", unit="rows", minimum=1)

    def check(self) -> None:
        super().check()
        for option in ("blur", "relax"):
            if not getattr(self, option) > 0:
                raise NeuronSelectError("must be above 0", option=option, value=getattr(self, option))

    def order(
        self, scores: np.ndarray, valid: np.ndarray, wanted: int | None = None, vectors: Vectors | None = None
    ) -> np.ndarray:
        import ot  # heavy

        best = row_scores(scores)
        everyone = best_first(best, valid)
        rows = np.sort(everyone[: self.candidates])
        table = table_of(scores)[rows]
        span = float(table.max() - table.min())
        cost = (table.max() - table) / (span or 1.0)
        sent = ot.unbalanced.sinkhorn_unbalanced(
            np.full(len(rows), 1 / len(rows)),
            np.full(table.shape[1], 1 / table.shape[1]),
            np.ascontiguousarray(cost),
            self.blur,
            (self.relax, float("inf")),
            method="sinkhorn_stabilized",
            numItermax=10_000,
        ).sum(axis=1)
        return then(rows[np.lexsort((rows, -best[rows], -sent))], everyone)

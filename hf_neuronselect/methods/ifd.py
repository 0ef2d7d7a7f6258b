"""IFD (arXiv 2308.12032, "Cherry"): how much a question helps the model to its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..core.options import opt
from ..signals.columns import RowBatch
from .base import Method, Target, register_method
from .why import Why


@register_method
@dataclass(frozen=True)
class Ifd(Method):
    """``meanNLL(A|Q) / meanNLL(A)``, largest first; rows above 1 are dropped, since their question does not help.

    The simplest form: the model as it is, not first tuned on a sample of the pool. The default budget is a share of the
    rows that are kept after the drops.
    """

    name = "ifd"
    paper = "arXiv:2308.12032"
    signals = ("answer_loss", "answer_alone_loss")
    needs_target = False
    counts_kept = True

    ratio: Literal["loss", "ppl"] = opt(
        "loss",
        "What is divided: mean losses (IFD), or perplexities, their exponentials (Superfiltering, arXiv 2402.00530).",
    )

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        given, alone = (rows[name].astype(np.float64) for name in self.signals)
        if self.ratio == "ppl":
            ratio = np.exp(np.minimum(given - alone, 1.0))  # what is above 1 is dropped, however large
        else:
            ratio = np.divide(given, alone, out=np.full(len(rows), np.nan), where=alone > 0)
        return np.where(ratio <= 1, ratio, np.nan)

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """The two losses."""
        given, alone = (float(row[name][0]) for name in self.signals)
        score = float(self.score(row, target)[0])
        value = "none: above 1, the question does not help" if np.isnan(score) else f"{score:.4f}"
        return Why(
            f"{value}; the answer's loss is {given:.4f} nats a token with its question and {alone:.4f} without"
            + (" (their perplexities are divided)" if self.ratio == "ppl" else "")
        )

"""IFD (arXiv 2308.12032, "Cherry"): how much a question helps the model to its answer."""

from __future__ import annotations

import numpy as np

from ..signals.columns import RowBatch
from .base import Method, Target, register_method


@register_method
class Ifd(Method):
    """``meanNLL(A|Q) / meanNLL(A)``, largest first; rows above 1 are dropped, since their question does not help.

    The simplest form: the model as it is, not first tuned on a sample of the pool.
    """

    name = "ifd"
    paper = "arXiv:2308.12032"
    signals = ("answer_loss", "answer_alone_loss")
    needs_target = False

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        given, alone = (rows[name].astype(np.float64) for name in self.signals)
        ratio = np.divide(given, alone, out=np.full(len(rows), np.nan), where=alone > 0)
        return np.where(ratio <= 1, ratio, np.nan)

"""NAG (arXiv 2604.15706): rows whose strongest neurons are those of the exemplars."""

from __future__ import annotations

import numpy as np

from ..signals.columns import RowBatch
from .base import Method, Target, register_method


@register_method
class Nag(Method):
    """Mean over a row's strongest neurons of the share of exemplars that have the neuron among theirs.

    The strongest are the 20 of each block whose up projection has the largest mean magnitude over tokens. Magnitudes are
    compared within a block; all blocks count alike.
    """

    name = "nag"
    paper = "arXiv:2604.15706"
    signals = ("strongest_neurons",)

    def fit(self, exemplars: RowBatch) -> Target:
        """``neurons``: int64, those of any exemplar, ascending; ``share``: float64, of the exemplars that have each."""
        strongest = exemplars.dense("strongest_neurons").astype(np.int64)
        neurons, count = np.unique(strongest, return_counts=True)
        return {"neurons": neurons, "share": count / len(strongest)}

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        strongest, neurons = rows.dense("strongest_neurons").astype(np.int64), target["neurons"]
        at = np.minimum(np.searchsorted(neurons, strongest), len(neurons) - 1)
        return np.where(neurons[at] == strongest, target["share"][at], 0.0).mean(axis=1)

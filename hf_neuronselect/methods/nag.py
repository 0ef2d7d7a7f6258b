"""NAG (arXiv 2604.15706): rows whose strongest neurons are those of the exemplars."""

from __future__ import annotations

import numpy as np

from ..signals.columns import RowBatch
from .base import Method, Target, register_method
from .why import Why


@register_method
class Nag(Method):
    """Mean over a row's strongest neurons of the share of exemplars that have the neuron among theirs.

    The strongest are the 20 of each block whose up projection has the largest mean magnitude over tokens. Magnitudes are
    compared within a block; all blocks count alike.
    """

    name = "nag"
    paper = "arXiv:2604.15706"
    signals = ("strongest_neurons",)
    tells_exemplars = True

    def fit(self, exemplars: RowBatch) -> Target:
        """``neurons``: int64, those of any exemplar, ascending; ``share``: float64, of the exemplars that have each."""
        strongest = exemplars.dense("strongest_neurons").astype(np.int64)
        neurons, count = np.unique(strongest, return_counts=True)
        return {"neurons": neurons, "share": count / len(strongest)}

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        strongest, neurons = rows.dense("strongest_neurons").astype(np.int64), target["neurons"]
        at = np.minimum(np.searchsorted(neurons, strongest), len(neurons) - 1)
        return np.where(neurons[at] == strongest, target["share"][at], 0.0).mean(axis=1)

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """Each exemplar's share, or without them each neuron's; they add up to the score."""
        own, score = row.dense("strongest_neurons")[0].astype(np.int64), float(self.score(row, target)[0])
        says = f"{score:.4f} = the mean over the row's {len(own)} strongest neurons of the share of exemplars with the same"
        if exemplars is None:
            at = np.minimum(np.searchsorted(target["neurons"], own), len(target["neurons"]) - 1)
            shares = np.where(target["neurons"][at] == own, target["share"][at], 0.0)
            return Why.of(says, "neuron", shares / len(own), ids=own, facts={"exemplars with it": shares})
        others = exemplars.dense("strongest_neurons").astype(np.int64)
        shared = np.asarray([len(np.intersect1d(own, other)) for other in others])
        says += f"; exemplar {exemplars.index[shared.argmax()]} is nearest ({int(shared.max())} neurons in common)"
        amounts = shared / (len(own) * len(others))
        return Why.of(says, "exemplar", amounts, ids=exemplars.index, facts={"neurons in common": shared})

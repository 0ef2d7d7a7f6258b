"""Diversity over SAE features (arXiv 2502.14050): rows that bring features which no row taken has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.options import opt
from ..signals.columns import RowBatch
from .base import Method, Target, register_method
from .why import Why


@register_method
@dataclass(frozen=True)
class SaeDiversity(Method):
    """How many features of the SAE a row has; rows are taken by the picker ``cover``: each brings a feature that is new.

    No target is needed. The paper reads the last layer with a threshold of 10; here the SAE's own block is read, and a row
    has a feature if its mean over tokens is above ``strong`` (choice): the paper's steps are not published.
    """

    name = "sae-diversity"
    paper = "arXiv:2502.14050"
    signals = ("mona",)
    needs_target = False
    default_picker = "cover(strong=0.9,by=mona)"

    strong: float = opt(0.0, "A row has the features whose mean over tokens is above this.", minimum=0)

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        sparse = rows.sparse("mona")
        of_row = np.repeat(np.arange(len(rows)), np.diff(sparse.indptr))
        return np.bincount(of_row, weights=sparse.values > self.strong, minlength=len(rows))

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """The features it has; which of them no row before it had, the picker alone knows."""
        units, values = row.sparse("mona").row(0)
        strong = values > self.strong
        says = f"it has {int(strong.sum())} features; rows are taken by how many of theirs no row before them had"
        return Why.of(says, "feature", np.where(strong, values, 0.0), ids=units, signal="mona")

"""Longest and shortest rows: length is a confounder of every method."""

from __future__ import annotations

import numpy as np

from ..signals.columns import FeatureBatch
from .base import Method, Target, register_method


@register_method
class Longest(Method):
    """Tokens fed to the model."""

    name = "longest"
    needs_target = False

    def score(self, batch: FeatureBatch, target: Target) -> np.ndarray:
        return batch.n_tokens.astype(np.float64)


@register_method
class Shortest(Method):
    """Minus the tokens fed to the model."""

    name = "shortest"
    needs_target = False

    def score(self, batch: FeatureBatch, target: Target) -> np.ndarray:
        return -batch.n_tokens.astype(np.float64)

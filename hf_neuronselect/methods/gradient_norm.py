"""The control of the gradient methods: how large a row's gradient is, whatever the target."""

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
class GradientNorm(Method):
    """Norm of a row's gradient at fresh LoRA factors, where the model is the untouched one; largest first.

    A random projection of the whole gradient: the second factors are zero, so only they have one. Ours; no influence on
    a target is in it, so a gradient method that picks the same rows has found large gradients, not useful ones.
    """

    name = "gradient-norm"
    signals = ("gradient",)
    needs_target = False

    first: Literal["large", "small"] = opt("large", "Which rows come first.")

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        norms = rows["gradient_norm"].astype(np.float64)
        return norms if self.first == "large" else -norms

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        norm = float(row["gradient_norm"][0])
        return Why(f"the norm of the row's gradient is {norm:.4g}, and {self.first} ones come first; no target counts")

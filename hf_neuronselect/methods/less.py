"""LESS (arXiv 2402.04333): rows whose training step would lower the exemplars' loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..signals.columns import RowBatch
from .base import Target, register_method
from .warmed import WarmedMethod, units
from .why import Why


@register_method
@dataclass(frozen=True)
class Less(WarmedMethod):
    """``sum_i w_i mean_j cos(P G_i, P g_ij)``: the row's Adam step ``G_i`` and the exemplars' gradients ``g_ij``.

    Over the warm-up's checkpoints i, weighted by the mean learning rate of their epoch; ``P`` projects (eq. 3 and sec. 4).
    Several subtasks are several targets; ``aggregate=max`` takes the best of them, as the paper does. Choices: ``P`` is a
    CountSketch, not a Rademacher matrix, and the weights sum to 1.
    """

    name = "less"
    paper = "arXiv:2402.04333"
    adam = True
    tells_exemplars = True

    def fit(self, exemplars: RowBatch) -> Target:
        """The exemplars' mean unit gradient at each checkpoint, float64 ``[checkpoints, dim]``, and the ``weights``."""
        means = [self.gradients(exemplars, signal).mean(axis=0) for signal in self.exemplar_signals]
        rates = np.asarray([one.rate for one in self.checkpoints])
        if not rates.any():  # a single step, which is the schedule's ramp
            rates = np.ones(len(rates))
        return {"gradients": np.stack(means), "weights": rates / rates.sum()}

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        parts = [
            units(rows.dense(str(getattr(signal, "name", signal)))) @ own
            for signal, own in zip(self.signals, target["gradients"], strict=True)
        ]
        return np.stack(parts, axis=1) @ target["weights"]

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """Each exemplar's share or, without them, each checkpoint's; they add up to the score."""
        own = [units(row.dense(str(getattr(signal, "name", signal))))[0] for signal in self.signals]
        score = float(self.score(row, target)[0])
        says = f"{score:.4g} = the mean cosine of the row's Adam step and the exemplars' gradients, over {len(own)} checkpoints"
        if exemplars is None:
            parts = [
                weight * float(step @ mean)
                for weight, step, mean in zip(target["weights"], own, target["gradients"], strict=True)
            ]
            return Why.of(says, "checkpoint", parts)
        cosines = np.stack(
            [self.gradients(exemplars, signal) @ step for signal, step in zip(self.exemplar_signals, own, strict=True)]
        )
        each = target["weights"] @ cosines
        says += f"; exemplar {exemplars.index[each.argmax()]} is nearest ({each.max():.4g})"
        return Why.of(says, "exemplar", each / len(each), ids=exemplars.index, facts={"cosine": each})

"""GIST (arXiv 2602.18584): rows whose gradients lie in the exemplars' few directions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.errors import NeuronSelectError
from ..core.options import opt
from ..signals.columns import RowBatch
from .base import Target, register_method
from .warmed import WarmedMethod, units
from .why import Why

MOST = 300
"""Exemplars that the directions are found from."""


@register_method
@dataclass(frozen=True)
class Gist(WarmedMethod):
    """Cosine of the row's gradient and the exemplars' mean gradient, both within the span of the exemplars' gradients.

    The span: the first ``directions`` right singular vectors of the exemplars' gradients at one checkpoint, the end of the
    warm-up's first epoch; plain gradients, without Adam's state. Several targets: ``aggregate=max``. Choice: gradients are
    projected to ``dim`` numbers first, which keeps their inner products.
    """

    name = "gist"
    paper = "arXiv:2602.18584"
    tells_exemplars = True

    directions: int = opt(50, "Singular vectors kept, at most.", minimum=1)

    @property
    def used_epochs(self) -> int:
        return 1

    def fit(self, exemplars: RowBatch) -> Target:
        """``basis`` float64 ``[directions, dim]``, orthonormal, and the mean gradient in it, ``mean`` ``[directions]``.

        Raises:
            NeuronSelectError: fewer than 2 exemplars.
        """
        if len(exemplars) < 2:
            raise NeuronSelectError("directions of gradients need at least 2 exemplars; 10 to 100 are usual",
                                    option="target", value=f"{len(exemplars)} usable row(s)")  # fmt: skip
        (signal,) = self.exemplar_signals
        whole = self.gradients(exemplars, signal) * exemplars[signal.norm].astype(np.float64)[:, None]  # type: ignore[union-attr]
        some = whole[:MOST]
        _, sizes, basis = np.linalg.svd(some, full_matrices=False)
        basis = basis[: min(self.directions, int((sizes > sizes[0] * 1e-6).sum()))]
        return {"basis": basis, "mean": units((whole @ basis.T).mean(axis=0)[None])[0]}

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        (signal,) = self.signals
        return units(rows.dense(str(getattr(signal, "name", signal))) @ target["basis"].T) @ target["mean"]

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """Each exemplar's share of the cosine, which add up to it."""
        score = float(self.score(row, target)[0])
        says = f"{score:.4g} = the cosine to the exemplars' mean gradient, within {len(target['mean'])} directions of theirs"
        if exemplars is None:
            return Why(f"{says}; which exemplar is nearest can be said where the exemplars are given")
        (of_row,), (of_exemplars,) = self.signals, self.exemplar_signals
        own = units(row.dense(str(getattr(of_row, "name", of_row))) @ target["basis"].T)[0]
        norms = exemplars[of_exemplars.norm].astype(np.float64)  # type: ignore[union-attr]
        others = (self.gradients(exemplars, of_exemplars) * norms[:, None]) @ target["basis"].T
        near = units(others) @ own
        says += f"; exemplar {exemplars.index[near.argmax()]} is nearest ({near.max():.4g})"
        parts = others @ own / (len(others) * np.linalg.norm(others.mean(axis=0)))
        return Why.of(says, "exemplar", parts, ids=exemplars.index, facts={"cosine": near})

"""NAIT (arXiv 2603.13201): projection of activation drift on a capability's directions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.options import opt
from ..signals.columns import RowBatch
from .base import Method, Target, register_method

if TYPE_CHECKING:
    from ..signals.projection import Projection

CANDIDATES = {"drift": "nait", "mean": "nait_mean", "last": "nait_last"}
FLAT_SPECTRUM = 1.05
"""Below this ratio of the first two eigenvalues a block's direction is not well determined."""


@register_method
@dataclass(frozen=True)
class Nait(Method):
    """``s = sum_l x_l . v_l`` with ``v_l`` the first principal direction of the exemplars' drifts, top 10 %.

    Per block: centred PCA of the exemplars' drift ``D_l = h[l][last] - h[l][first]``, first component, unit norm;
    where the mean drift points the other way, the sign is turned.
    """

    name = "nait"
    paper = "arXiv:2603.13201"
    exemplar_signals = ("nait",)
    optional_signals = ("nait_content",)
    default_ratio = 0.10

    candidate: Literal["drift", "mean", "last"] = opt(
        "drift", "A row's vectors: its drift (choice), mean or last state."
    )
    normalize: bool = opt(False, "Divide each block's drift by its norm, so that deep blocks do not weigh more.")
    direction: Literal["pca", "mean"] = opt("pca", "pca (the paper), or the mean drift itself, unit norm (a control).")

    @property
    def signals(self) -> tuple[str, ...]:  # type: ignore[override]
        return (CANDIDATES[self.candidate],)

    def fit(self, exemplars: RowBatch) -> Target:
        """Directions of a capability.

        Returns:
            ``directions`` float64 ``[blocks, width]``, unit rows; ``eigenvalue_ratio`` ``[blocks]``;
            ``content_sign_changes``: blocks whose sign turns when endpoints are content tokens (-1: unknown).

        Raises:
            NeuronSelectError: fewer than 2 exemplars, or identical ones.
        """
        if len(exemplars) < 2:
            raise NeuronSelectError(
                "a principal direction needs at least 2 exemplars; 10 to 100 are usual", option="target",
                value=f"{len(exemplars)} usable row(s)",
            )  # fmt: skip
        drifts = self._drifts(exemplars.dense("nait"))
        mean = drifts.mean(axis=0)
        directions, ratios = np.empty_like(mean), np.empty(len(mean))
        for block in range(len(mean)):
            centred = drifts[:, block] - mean[block]
            _, singular, axes = np.linalg.svd(centred, full_matrices=False)
            if singular[0] <= 1e-6 * max(float(np.linalg.norm(drifts[:, block])), 1e-30):
                raise NeuronSelectError(
                    "the exemplars are identical: their drift has no direction; give different examples",
                    option="target",
                )
            directions[block] = axes[0]
            ratios[block] = (singular[0] / singular[1]) ** 2 if singular[1] > 0 else np.inf
        if self.direction == "mean":
            directions = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        signs = np.where((mean * directions).sum(axis=1) < 0, -1.0, 1.0)
        if flat := int((ratios < FLAT_SPECTRUM).sum()):
            warnings.warn(
                f"in {flat} of {len(ratios)} blocks the first two principal directions are equally strong: "
                "the direction is not well determined; give more exemplars",
                NeuronSelectWarning,
                stacklevel=2,
            )
        changed = self._content_sign_changes(exemplars, directions, signs)
        return {
            "directions": directions * signs[:, None],
            "eigenvalue_ratio": ratios,
            "content_sign_changes": np.asarray([changed], dtype=np.int64),
        }

    def _content_sign_changes(self, exemplars: RowBatch, directions: np.ndarray, signs: np.ndarray) -> int:
        """Under a chat template the first token is the same state everywhere and can decide every sign."""
        if "nait_content" not in exemplars:
            return -1
        content = self._drifts(exemplars.dense("nait_content")).mean(axis=0)
        changed = int((np.where((content * directions).sum(axis=1) < 0, -1.0, 1.0) != signs).sum())
        if changed:
            warnings.warn(
                f"the sign of {changed} of {len(signs)} block directions would turn if the drift ran between content "
                "tokens, so the template's first token decides them: compare the picks with random before trusting them",
                NeuronSelectWarning,
                stacklevel=3,
            )
        return changed

    def _drifts(self, drifts: np.ndarray) -> np.ndarray:
        """``[n, blocks, width]`` in float64, normalised if asked."""
        drifts = drifts.astype(np.float64)
        if self.normalize:
            norms = np.linalg.norm(drifts, axis=2, keepdims=True)
            drifts = np.divide(drifts, norms, out=np.zeros_like(drifts), where=norms > 0)
        return drifts

    def compact_signals(self, targets: Sequence[Target]) -> tuple[Projection, ...]:
        from ..signals.projection import Projection  # torch is loaded only where rows are computed

        vectors = [np.asarray(target["directions"], dtype=np.float64) for target in targets]
        return tuple(Projection(CANDIDATES[self.candidate], v, normalize=self.normalize) for v in vectors)

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        """``sum_l x_l . v_l``, from the vectors ``x_l`` or from their projections, whichever the rows have."""
        (compact,) = self.compact_signals([target])
        if compact.name in rows:
            return rows.dense(compact.name).astype(np.float64).sum(axis=1)
        drifts = self._drifts(rows.dense(CANDIDATES[self.candidate]))
        return np.einsum("nld,ld->n", drifts, target["directions"])

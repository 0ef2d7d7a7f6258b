"""NAIT (arXiv 2603.13201): projection of activation drift on a capability's directions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.options import opt
from ..core.provenance import Budget
from ..signals.columns import RowBatch
from .base import Method, Target, register_method
from .why import Moves, Why

if TYPE_CHECKING:
    from ..signals.projection import Projection

DRIFTS = {"content": "nait", "template": "nait_template", "answer": "nait_answer"}
CANDIDATES = {
    "content": {"drift": "nait", "mean": "content_mean", "last": "nait_last"},
    "template": {"drift": "nait_template", "mean": "nait_mean", "last": "nait_template_last"},
    "answer": {"drift": "nait_answer", "mean": "answer_mean", "last": "nait_last"},
}
PAPER = {"ends": "template", "direction": "pca"}
OURS = {"ends": "content", "direction": "svd"}
FLAT_SPECTRUM = 1.05
"""Below this ratio of the first two squared singular values a block's direction is not well determined."""
WEAK_SIGN, WEAK_SHARE = 0.1, 0.25
"""A block's sign is weak where mean drift and direction are nearly orthogonal; so many such blocks are worth a warning."""
COMMON = 0.95
"""Above this cosine to the pool's mean drift, a direction is not about the target."""


@register_method
@dataclass(frozen=True)
class Nait(Method):
    """``s = sum_l x_l . v_l`` with ``v_l`` the first principal direction of the exemplars' drifts, top 10 %.

    Per block: ``D_l = h[l][last] - h[l][first]`` of each exemplar, of which ``v_l`` is the first direction, unit norm;
    where the mean drift points the other way, the sign is turned.

    The paper leaves open which tokens are the first and last. Read to the letter (``reading="paper"``: of the whole
    text, centred PCA) the bundled model picks long rows: under a chat template the first token is the same state in
    every row, and centring takes away what the exemplars share. So the default is our reading (**choice**): the ends of
    the turns' own texts, and the first right singular vector without centring.
    """

    name = "nait"
    paper = "arXiv:2603.13201"
    default_budget = Budget(ratio=0.10)
    prototype = "directions"

    reading: Literal["content", "paper"] = opt(
        "content", "content: ends=content, direction=svd (choice); paper: ends=template, direction=pca, to the letter."
    )
    ends: Literal["content", "template", "answer"] | None = opt(
        None, "First and last token: of the turns' texts, of the whole text, of the answers; default by the reading."
    )
    direction: Literal["svd", "pca", "mean"] | None = opt(
        None, "First singular vector, first component of centred PCA, or mean drift; default by the reading."
    )
    candidate: Literal["drift", "mean", "last"] = opt(
        "drift", "A row's vectors: its drift (choice), mean or last state."
    )
    normalize: bool = opt(False, "Divide each block's drift by its norm, so that deep blocks do not weigh more.")

    @property
    def _read(self) -> dict[str, str]:
        """Ends and direction, as given or by the reading."""
        given = {"ends": self.ends, "direction": self.direction}
        usual = PAPER if self.reading == "paper" else OURS
        return {name: value or usual[name] for name, value in given.items()}

    @property
    def signals(self) -> tuple[str, ...]:  # type: ignore[override]
        return (CANDIDATES[self._read["ends"]][self.candidate],)

    @property
    def exemplar_signals(self) -> tuple[str, ...]:  # type: ignore[override]
        return (DRIFTS[self._read["ends"]],)

    def fit(self, exemplars: RowBatch) -> Target:
        """Directions of a capability.

        Returns:
            ``directions`` float64 ``[blocks, width]``, unit rows; ``eigenvalue_ratio`` ``[blocks]``: of the first two
            squared singular values; ``sign_cosine`` ``[blocks]``: of the mean drift and the direction.

        Raises:
            NeuronSelectError: fewer than 2 exemplars, or identical ones.
        """
        if len(exemplars) < 2:
            raise NeuronSelectError(
                "a principal direction needs at least 2 exemplars; 10 to 100 are usual", option="target",
                value=f"{len(exemplars)} usable row(s)",
            )  # fmt: skip
        drifts = self._drifts(exemplars.dense(self.exemplar_signals[0]))
        mean, which = drifts.mean(axis=0), self._read["direction"]
        directions, ratios = np.empty_like(mean), np.empty(len(mean))
        for block in range(len(mean)):
            own = drifts[:, block]
            centred = own - mean[block]
            if np.linalg.norm(centred) <= 1e-6 * max(float(np.linalg.norm(own)), 1e-30):
                raise NeuronSelectError(
                    "the exemplars are identical: their drift has no direction; give different examples",
                    option="target",
                )
            directions[block], ratios[block] = first_direction(own if which == "svd" else centred)
        norms = np.linalg.norm(mean, axis=1)
        if which == "mean":
            directions = mean / np.maximum(norms, 1e-30)[:, None]
        cosines = (mean * directions).sum(axis=1) / np.maximum(norms, 1e-30)
        directions = directions * np.where(cosines < 0, -1.0, 1.0)[:, None]
        self._warn(ratios, np.abs(cosines))
        return {"directions": directions, "eigenvalue_ratio": ratios, "sign_cosine": np.abs(cosines)}

    def _warn(self, ratios: np.ndarray, cosines: np.ndarray) -> None:
        if flat := int((ratios < FLAT_SPECTRUM).sum()):
            warnings.warn(
                f"in {flat} of {len(ratios)} blocks the first two principal directions are equally strong: "
                "the direction is not well determined; give more exemplars",
                NeuronSelectWarning,
                stacklevel=3,
            )
        if (weak := int((cosines < WEAK_SIGN).sum())) > WEAK_SHARE * len(cosines):
            warnings.warn(
                f"in {weak} of {len(cosines)} blocks the exemplars' mean drift is nearly orthogonal to the direction, so its "
                "sign is chance: use direction=svd with ends=content (the default reading), or more exemplars",
                NeuronSelectWarning,
                stacklevel=3,
            )

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
        return tuple(Projection(self.signals[0], v, normalize=self.normalize) for v in vectors)

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        """``sum_l x_l . v_l``, from the vectors ``x_l`` or from their projections, whichever the rows have."""
        (compact,) = self.compact_signals([target])
        if compact.name in rows:
            return rows.dense(compact.name).astype(np.float64).sum(axis=1)
        drifts = self._drifts(rows.dense(self.signals[0]))
        return np.einsum("nld,ld->n", drifts, target["directions"])

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """Each block's projection ``x_l . v_l``, which add up to the score, and the tokens whose states moved it."""
        (compact,) = self.compact_signals([target])
        if compact.name in row and self.signals[0] not in row:
            parts, weights = row.dense(compact.name)[0].astype(np.float64), None
        else:
            vectors = row.dense(self.signals[0]).astype(np.float64)
            parts, weights = (self._drifts(vectors)[0] * target["directions"]).sum(axis=1), target["directions"]
            if self.normalize:
                norms = np.linalg.norm(vectors[0], axis=1, keepdims=True)
                weights = np.divide(weights, norms, out=np.zeros_like(weights), where=norms > 0)
        says = f"{parts.sum():.4g} = the sum over {len(parts)} blocks of the drift along the exemplars' direction"
        moves = None if weights is None else Moves(self.signals[0], weights)
        return Why.of(says, "block", parts, moves=moves)

    def doubts(self, rows: RowBatch, target: Target) -> list[str]:
        """Whether the direction is the pool's own mean drift, which every row has."""
        if self.candidate != "drift" or self.signals[0] not in rows:
            return []
        mean = self._drifts(rows.dense(self.signals[0])).mean(axis=0)
        directions = target["directions"]
        cosines = np.abs((mean * directions).sum(axis=1)) / np.maximum(np.linalg.norm(mean, axis=1), 1e-30)
        if (common := int((cosines > COMMON).sum())) * 2 <= len(cosines):
            return []
        return [
            f"in {common} of {len(cosines)} blocks the direction is the mean drift of the pool's own rows, so the scores say "
            "little of the target; try nait-contrast, which takes the pool's mean off"
        ]


def first_direction(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """The first right singular vector of ``[n, width]``, unit norm, and the ratio of the first two squared singular values.

    From the smaller of the two products of the rows: a few exemplars of a wide model cost little.
    """
    few = len(rows) <= rows.shape[1]
    squares, vectors = np.linalg.eigh(rows @ rows.T if few else rows.T @ rows)
    direction = rows.T @ vectors[:, -1] if few else vectors[:, -1]
    second = float(squares[-2]) if len(squares) > 1 else 0.0
    return direction / np.linalg.norm(direction), float(squares[-1]) / second if second > 0 else np.inf

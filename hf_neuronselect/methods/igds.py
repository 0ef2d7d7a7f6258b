"""IGDS (arXiv 2604.25167): rows that activate the SAE features which help a model answer the exemplars."""

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
from .why import Why

if TYPE_CHECKING:
    from ..signals.intervention import FeatureGains


@register_method
@dataclass(frozen=True)
class Igds(Method):
    """Sum of the activations of a target's causal features at the last token of the prompt, top 50 %.

    Recalled are the features that are active there in at least ``tau`` of the exemplars. Of these, the ``top_k`` are kept with
    the largest mean gain over the exemplars, ``delta_f = mean_i [m_i(h + a_f W_dec[f]) - m_i(h)]``: how much better the model
    answers with the feature doubled.

    Choices: the task's metric ``m`` is the F1 of words unless ``measure`` names another; the vector ``a_f W_dec[f]`` of the
    prompt's last token is added at that token and at every one behind it; one SAE is read, not one of each layer; of a row of
    several turns, the first answer counts. ``measure="loss"`` is a cheaper form that is not the paper's: minus the loss of
    the exemplar's own answer, for which nothing is generated.
    """

    name = "igds"
    paper = "arXiv:2604.25167"
    signals = ("prompt_latents",)
    default_budget = Budget(ratio=0.50)
    costly = True

    measure: Literal["words", "number", "loss"] = opt(
        "words",
        "What a feature must improve: the words, or the last number, of generated answers; or, cheaper, the loss of the "
        "exemplars' own answers.",
    )
    tau: float = opt(0.8, "Share of the exemplars in which a feature must be active.", minimum=0)
    top_k: int = opt(1, "Features kept.", minimum=1)
    answer_tokens: int = opt(256, "Longest generated answer.", unit="tokens", minimum=1)

    def check(self) -> None:
        super().check()
        if self.tau > 1:
            raise NeuronSelectError("is a share of the exemplars, at most 1", option="tau", value=self.tau)

    def further_signals(self, exemplars: RowBatch) -> tuple[FeatureGains, ...]:
        """The gains of the features that are recalled.

        Raises:
            NeuronSelectError: fewer than 2 exemplars, or no feature is active in enough of them.
        """
        if len(exemplars) < 2:
            raise NeuronSelectError(
                "features that exemplars share need at least 2 of them; 10 to 100 are usual", option="target",
                value=f"{len(exemplars)} usable row(s)",
            )  # fmt: skip
        return (self._gains(self._recalled(exemplars).tolist()),)

    def _gains(self, features: Sequence[int] = ()) -> FeatureGains:
        from ..signals.intervention import FeatureGains  # torch is loaded only where rows are computed

        return FeatureGains(self.measure, self.answer_tokens, features)

    def _recalled(self, exemplars: RowBatch) -> np.ndarray:
        """Features that are active in at least tau of the exemplars, ascending."""
        features, count = np.unique(exemplars.sparse("prompt_latents").indices, return_counts=True)
        share = count / len(exemplars)
        recalled = features[share >= self.tau - 1e-9]
        if not len(recalled):
            raise NeuronSelectError(
                f"no feature is active at the prompt's end in so many exemplars (the most: {share.max(initial=0):.0%}); "
                "lower it", option="tau", value=self.tau,
            )  # fmt: skip
        return recalled

    def fit(self, exemplars: RowBatch) -> Target:
        """The features kept, best first.

        Returns:
            ``features`` int64 ``[k]``; ``gain`` float64 ``[k]``, their mean gains; ``share`` float64 ``[k]``, of the exemplars in
            which each is active.
        """
        measured = exemplars.sparse(self._gains().name)
        # A feature that is not active in an exemplar has a_f = 0 there, and so the gain 0.
        features, place, count = np.unique(measured.indices, return_inverse=True, return_counts=True)
        gain = np.bincount(place, weights=measured.values, minlength=len(features)) / len(exemplars)
        kept = np.isin(features, self._recalled(exemplars))  # a part of the exemplars may recall others
        features, gain, share = features[kept], gain[kept], count[kept] / len(exemplars)
        best = np.argsort(-gain, kind="stable")[: self.top_k]
        if not (gain[best[:1]] > 0).any():
            warnings.warn(
                f"doubling none of the {len(features)} features that the exemplars share improves the model's answers "
                f"(measure={self.measure}): the best is kept, and may have nothing to do with the task; try another measure "
                "or SAE", NeuronSelectWarning, stacklevel=2,
            )  # fmt: skip
        return {"features": features[best].astype(np.int64), "gain": gain[best], "share": share[best]}

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        latents = rows.sparse("prompt_latents")
        of_row = np.repeat(np.arange(len(rows)), np.diff(latents.indptr))
        kept = np.isin(latents.indices, target["features"])
        return np.bincount(of_row, weights=np.where(kept, latents.values.astype(np.float64), 0), minlength=len(rows))

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """The features kept: their activations at the prompt's end, which add up to the score, and their gains."""
        own = dict(zip(*(part.tolist() for part in row.sparse("prompt_latents").row(0)), strict=True))
        values = np.asarray([own.get(int(feature), 0.0) for feature in target["features"]], np.float64)
        says = f"{values.sum():.4g} = the activations at the prompt's end of the {len(values)} features that help most"
        facts = {"gain": target["gain"], "exemplars with it": target["share"]}
        return Why.of(says, "feature", values, ids=target["features"], facts=facts)

"""The causal check: does a task's loss rise without the features that explain its picks?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from ..core import progress
from ..core.errors import NeuronSelectError
from ..core.intervals import mean_of, paired_difference_of
from ..explain.causal import CausalCheck, Named
from ..models.ablation import Ablation, Activity
from ..models.loading import causal_lm_of, decoding_sae, sae_on
from ..rows.encode import Sample
from ..signals.base import signals_of
from ..signals.forward import place_of
from ..signals.loss import AnswerLoss, LossEngine
from .why import Explainer

PICKS = 100
"""Best picks that are explained at most."""
ROWS = 100
"""Rows whose answers are read at most."""
FEW = 10
"""Rows below which an interval over them says too little."""
NEAR = 8
"""Each feature is matched with one of so many that are nearest in activity."""
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class CausalOptions:
    """How it is measured.

    Attributes:
        k: features zeroed. draws: sets of random features. seed: of the draws.
    """

    k: int = 16
    draws: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("k", "draws"):
            if getattr(self, name) < 1:
                raise NeuronSelectError("must be at least 1", option=name, value=getattr(self, name))


def causal_check(explainer: Explainer, options: CausalOptions, held_out: Dataset | None = None) -> CausalCheck:
    """Zero the features that explain the picks, and random ones of like activity that add as much; see :class:`CausalCheck`.

    Args:
        held_out: rows of the task; default the exemplars that the target was fitted on.

    Raises:
        NeuronSelectError: the scores are not made from an SAE's features; no model, SAE with a decoder, or rows at hand; too few
            rows with an answer, or too few features.
    """
    evidence = explainer.evidence
    rows, rows_are = held_out, "held-out rows"
    if rows is None:
        rows, rows_are = evidence.examples, "exemplars, on which the target was fitted"
    if rows is None:
        raise NeuronSelectError(
            "answers of the task are needed: give its exemplars, NAME=ROWS, or other rows of it (held_out)", option="target",
            value=evidence.target,
        )  # fmt: skip
    shares, picks = feature_shares(explainer)
    ablation = _ablation(explainer)
    samples, left_out = _samples(explainer, rows, options.seed)
    with progress.track("causal check", len(samples)) as told:
        progress.read(len(samples), (3 + options.draws) * sum(len(sample.input_ids) for sample in samples))
        activity = ablation.activity(samples, _BATCH_TOKENS)
        named, notes = _named(shares, activity, options.k)
        sets = [named, *random_sets(named, activity, options.draws, options.seed)]
        found = ablation.losses(samples, sets, _BATCH_TOKENS)
        told.done(len(samples))
    if not np.isfinite(found.losses).all():
        raise NeuronSelectError("the loss is not finite; make the selection with dtype float32", option="dtype")
    rises = found.losses[1:] - found.losses[0]
    if len(samples) < FEW:
        notes.append(f"{len(samples)} rows are too few: an interval over them is too narrow{left_out}")
    if held_out is None:
        notes.append("these rows are not held out: --held-out ROWS takes others of the task")
    return CausalCheck(
        method=evidence.method.name, target=evidence.target,
        features=tuple(
            Named(int(one), shares[int(one)], float(activity.size[one]), float(activity.rate[one]),
                  explainer.behind.feature_label(int(one)))
            for one in named
        ),
        picks=picks, rows=len(samples), rows_are=rows_are, loss=mean_of(found.losses[0]), rise=mean_of(rises[0]),
        random_rise=mean_of(rises[1:].mean(axis=0)), above=paired_difference_of(rises[0], rises[1:]),
        draws=tuple(rises[1:].mean(axis=1).tolist()), random_features=sum(map(len, sets[1:])) / options.draws, taken=float(found.taken[0]),
        random_taken=float(found.taken[1:].mean()), notes=tuple(notes),
    )  # fmt: skip


def feature_shares(explainer: Explainer) -> tuple[dict[int, float], int]:
    """Feature -> its mean share of the sums that the best picks' scores are made from; and how many picks.

    Raises:
        NeuronSelectError: they are not made from an SAE's features.
    """
    picks = min(PICKS, len(explainer.selection))
    method, found = explainer.evidence.method, dict[int, float]()
    of_sae = any(one.needs_sae for one in signals_of(method.signals))
    if of_sae:
        explainer.evidence.read_ahead(explainer.selection.indices[:picks].tolist())
    for place in range(picks):
        why = explainer.reasons(place)
        if why.unit != "feature" or not of_sae:
            raise NeuronSelectError(
                f"{method.name} does not score by features of an SAE: select by a method that reads an SAE's latents", option="method", value=method.name,
            )  # fmt: skip
        for feature, share in zip(why.ids.tolist(), why.shares.tolist(), strict=True):
            found[feature] = found.get(feature, 0.0) + share / picks
    return found, picks


def ranked_by(shares: dict[int, float]) -> list[int]:
    """The features of positive shares, the largest first, ties to the lower number."""
    return sorted((one for one in shares if shares[one] > 0), key=lambda one: (-shares[one], one))


def _ablation(explainer: Explainer) -> Ablation:
    extractor = explainer.evidence.extractor
    if extractor is None or extractor.extraction.sae is None:
        raise NeuronSelectError("the model and its SAE are needed: name their folders (model, sae)", option="model")
    extraction = extractor.extraction
    model = causal_lm_of(extraction.spec, place_of(extraction, None))
    assert extraction.sae is not None
    options, device = extraction.options, next(model.parameters()).device
    encoder = sae_on(extraction.sae, options.layer, device, options.dtype)
    return Ablation(model, encoder, decoding_sae(extraction.sae, options.layer), options.top_k_features)


def _samples(explainer: Explainer, rows: Dataset, seed: int) -> tuple[list[Sample], str]:
    """At most :data:`ROWS` random rows with an answer, as the model reads them; and why others are left out.

    Raises:
        NeuronSelectError: fewer than 2.
    """
    evidence = explainer.evidence
    assert evidence.extractor is not None
    order = np.random.default_rng(seed).permutation(len(rows))[: 2 * ROWS]
    conversations = [evidence.conversation(rows, int(i)) for i in order]
    read = LossEngine(evidence.extractor.extraction).read(conversations, [AnswerLoss()])["answer_loss"]
    samples = [sample for sample in read if not sample.skip][:ROWS]
    skips = [sample.skip.removeprefix("error: ") for sample in read if sample.skip]
    left_out = f" ({len(skips)} are left out, the first for: {skips[0]})" if skips else ""
    if len(samples) < 2:
        raise NeuronSelectError(
            f"at least 2 rows with an answer are needed{left_out}; 20 to 100 are usual", option="held_out",
            value=f"{len(samples)} usable row(s)",
        )  # fmt: skip
    return samples, left_out


def _named(shares: dict[int, float], activity: Activity, k: int) -> tuple[np.ndarray, list[str]]:
    """The features of the largest shares, ties to the lower number; and what is to be said.

    Raises:
        NeuronSelectError: none is active on the rows.
    """
    ranked = ranked_by(shares)[:k]
    active = [one for one in ranked if activity.rate[one] > 0]
    notes = []
    if len(ranked) < k:
        notes.append(f"only {len(ranked)} features explain the picks, not {k}")
    if silent := len(ranked) - len(active):
        notes.append(f"{silent} of the {len(ranked)} features are active on no token of the rows, and are left out")
    if not active:
        raise NeuronSelectError("no feature that explains the picks is active on these rows: give rows of the task",
                                option="held_out")  # fmt: skip
    return np.asarray(active, np.int64), notes


def random_sets(named: np.ndarray, activity: Activity, draws: int, seed: int) -> list[np.ndarray]:
    """Draws of other features of like activity, as many as together add as much to the activation.

    Each feature gets a partner among the :data:`NEAR` nearest that are not taken yet, and further ones until they add what it
    adds: the most active have no equals. Near is what adds as much and is active as often,
    ``|log size/size'| + |log rate/rate'|``. The most active choose first.

    Raises:
        NeuronSelectError: fewer other features are active.
    """
    others = np.setdiff1d(np.flatnonzero(activity.rate > 0), named)
    if len(others) < len(named):
        raise NeuronSelectError(
            f"only {len(others)} other features are active on these rows, too few to compare with: lower it", option="k",
            value=len(named),
        )  # fmt: skip
    size, rate = (np.log(np.maximum(one, 1e-30)) for one in (activity.size, activity.rate))
    order = named[np.argsort(-activity.size[named], kind="stable")]
    found = []
    for nth in range(draws):
        draw, free, chosen, missing = np.random.default_rng([seed, nth]), others, list[int](), 0.0
        for one in order:
            missing += float(activity.size[one])
            while len(free):
                far = np.abs(size[free] - size[one]) + np.abs(rate[free] - rate[one])
                partner = int(free[draw.choice(np.argsort(far, kind="stable")[:NEAR])])
                adds = float(activity.size[partner])
                chosen.append(partner)
                free, missing = free[free != partner], missing - adds
                if missing < adds / 2:
                    break
        found.append(np.asarray(chosen, np.int64))
    return found

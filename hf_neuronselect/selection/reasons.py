"""What a report tells of its rows: reasons of those shown as cards, and a sample of the pool. Only these cost a pass of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset

from ..core import progress
from ..core.errors import NeuronSelectError
from ..explain.explanation import Part
from ..explain.features import TargetFeature
from ..explain.page_data import PoolTable, best_target
from ..explain.pool_map import MOST_EXEMPLARS
from ..explain.reasons import Reasons
from ..signals.base import signals_of
from ..signals.columns import RowBatch
from .evidence import Evidence
from .sample import COMPUTED_ROWS, FEATURES, LEAST_COMPUTED, RAW, PoolSample, computed_sample, numbers_of, sample_pool
from .target_features import target_features
from .why import Explainer

if TYPE_CHECKING:
    from .selection import Selection

PICKS, NEAR, PARTS = 12, 6, 5
"""Picks and near misses whose reasons are shown, and parts of each."""
_BEGINNING = 1000  # characters
_COMMAND = "neuronselect report FOLDER"
_NEVER_AGAIN = ("judge",)  # engines that cost money


@dataclass(frozen=True)
class Told:
    """What a report tells beside scores and texts.

    Attributes:
        reasons: place in the pool table -> why the row has its score. unexplained: why there are none, a sentence, or "".
        features: target -> the features that carry it. sample: rows of the pool with their signals, or None.
        unsampled: why there is none, a sentence, or "". exemplars, examples: target -> exemplars' signals, and their texts.
    """

    reasons: Mapping[int, Reasons] = field(default_factory=dict)
    unexplained: str = ""
    features: Mapping[str, tuple[TargetFeature, ...]] = field(default_factory=dict)
    sample: PoolSample | None = None
    unsampled: str = ""
    exemplars: Mapping[str, RowBatch] = field(default_factory=dict)
    examples: Mapping[str, Sequence[str]] = field(default_factory=dict)


def told_of(selection: Selection, table: PoolTable, picks: Sequence[int], near: Sequence[int], load: bool) -> Told:
    """Reasons, and a sample of the pool.

    Args:
        picks, near: places in the table. load: whether the model is loaded for it where it is not.
    """
    shown = [*picks[:PICKS], *near[:NEAR]]
    reasons: dict[int, Reasons] = {}
    features: dict[str, tuple[TargetFeature, ...]] = {}
    exemplars: dict[str, RowBatch] = {}
    examples: dict[str, list[str]] = {}
    sample, unsampled = None, ""
    try:
        for target, places in _by_target(selection, table, shown).items():
            explainer = selection.explainer(target=target)
            evidence = explainer.evidence
            _check(explainer, load)
            numbers = {place: int(table.index[place]) for place in places}
            if sample is None and not unsampled:
                sample, unsampled = sampled(explainer, table, [int(table.index[place]) for place in shown])
            if sample is not None:
                explainer.average_over(sample.rows.take(np.flatnonzero(sample.drawn)))
            evidence.read_ahead(list(numbers.values()))
            for place, number in numbers.items():
                if (one := _reasons(explainer, number, sample)) is not None:
                    reasons[place] = one
            if sample is not None and (of_target := target_features(explainer, sample)):
                features[evidence.target] = of_target
            if (own := evidence.selector.kept.get(evidence.target) or evidence.exemplars) is not None:
                exemplars[evidence.target] = own
                examples[evidence.target] = _texts_of(explainer, own.index[:MOST_EXEMPLARS].tolist())
    except NeuronSelectError as cause:
        return Told(unexplained=f"Why these rows have their scores is not shown: {cause.message}.", unsampled=unsampled)
    return Told(reasons, "", features, sample, unsampled, exemplars, examples)


def _texts_of(explainer: Explainer, numbers: Sequence[int]) -> list[str]:
    """Beginnings of a target's exemplars; of a stream, which may run only once, none."""
    data = explainer.evidence.examples
    if not isinstance(data, Dataset):
        return []
    return [explainer.evidence.conversation(data, number).content()[:_BEGINNING] for number in numbers]


def sampled(explainer: Explainer, table: PoolTable, shown: Sequence[int] = ()) -> tuple[PoolSample | None, str]:
    """A sample of the pool, from its store or else computed, or why there is none."""
    evidence = explainer.evidence
    able, picks = table.index[table.able], evidence.selection.indices.tolist()
    try:
        if evidence.store is not None:
            return sample_pool(evidence.store, evidence.stored, able, picks, shown), ""
        return _computed(evidence, able, picks, shown), ""
    except NeuronSelectError as cause:
        return None, cause.message


def _computed(evidence: Evidence, able: np.ndarray, picks: Sequence[int], shown: Sequence[int]) -> PoolSample:
    """A small sample, over which the model runs.

    Raises:
        NeuronSelectError: no model or no pool, or a method whose signals take long or are no vectors.
    """
    own = [signal for signal in evidence.missing if signal.has_vector]
    if evidence.method.costly or not own:
        raise NeuronSelectError(
            "the signals of the pool were not kept: neuronselect extract keeps them in a store, and "
            f"{_COMMAND} --features STORE adds this"
        )
    if evidence.pool is None:
        raise NeuronSelectError(f"rows of the pool are needed; {_COMMAND} --pool POOL adds this")
    extractor = evidence.extractor
    if extractor is None or extractor.extraction.model is None:
        raise NeuronSelectError(f"the model is not loaded; {_COMMAND} --pool POOL loads it and adds this")
    names = [signal.name for signal in own]
    more: list[str] = []
    if any(one.engine == "forward" for one in evidence.missing):  # the model runs anyway
        more += [FEATURES] if extractor.extraction.sae and FEATURES not in names else []
        more += [] if set(RAW) & set(names) else [RAW[0]]
    most = min(COMPUTED_ROWS, max(LEAST_COMPUTED, len(able) // 4))
    numbers, by_chance = numbers_of(able, picks, shown, most)
    with progress.track("rows for the report", len(numbers)) as told:
        rows = evidence.compute(numbers.tolist(), [*evidence.missing, *signals_of(more)])
        told.done(len(numbers))
    if not len(rows):
        raise NeuronSelectError("none of the rows tried can be read")
    whole = int(by_chance.sum()) == len(able)
    return computed_sample(rows, numbers[by_chance], picks, [*names, *more], whole=whole)


def _by_target(selection: Selection, table: PoolTable, places: Sequence[int]) -> dict[str | None, list[int]]:
    """Every target, and the rows that suit it best."""
    if len(table.targets) < 2:
        return {None: list(places)}
    names, best = list(table.targets), best_target(table)
    found: dict[str | None, list[int]] = {name: [] for name in names}
    for place in places:
        found[names[int(best[place])]].append(place)
    return found


def _check(explainer: Explainer, load: bool) -> None:
    """Refuse what would cost more than a pass over the rows shown.

    Raises:
        NeuronSelectError: so it would; the command that helps is named.
    """
    evidence, method = explainer.evidence, explainer.evidence.method
    runs = [one for one in signals_of(method.signals) if one.engine != "text" and not (evidence.stored and one.stored)]
    if any(one.engine in _NEVER_AGAIN for one in runs):
        raise NeuronSelectError("a judge gave the scores, and it is not asked again")
    reads_texts = all(one.engine == "text" for one in signals_of(method.signals))
    at_hand = evidence.selector.extractor is not None or load or evidence.selector.extraction.model is None
    if not (reads_texts or at_hand):
        raise NeuronSelectError(f"the model is not loaded; {_COMMAND} loads it and adds them")
    if method.observes and evidence.target not in evidence.selection.finished:
        if evidence.pool is None:
            raise NeuronSelectError(f"{method.name} weighs a row by the whole pool; {_COMMAND} --pool POOL adds them")
        if runs:
            raise NeuronSelectError(
                f"{method.name} weighs a row by the whole pool, which would be read again; {_COMMAND} --pool POOL --features STORE "
                "adds them"
            )


def _reasons(explainer: Explainer, number: int, sample: PoolSample | None) -> Reasons | None:
    """Of one row; None where it is not at hand, or cannot be read."""
    evidence, behind = explainer.evidence, explainer.behind
    try:
        text, why = evidence.text_of(number), explainer.why(number)
        first = range(min(PARTS, len(why.ids)))
        heat = behind.heat(why, text, first)
    except NeuronSelectError as cause:
        if cause.option in ("pool", "row"):
            return None
        raise
    shares = why.shares
    fires = sample.fires.get(why.signal) if sample is not None else None

    def part(i: int) -> Part:
        unit = int(why.ids[i])
        return Part(
            why.names[i] if why.names else f"{why.unit} {unit}", why.unit, None if why.names else unit,
            float(why.amounts[i]), float(shares[i]), {},
            usual=None if why.usual is None else float(why.usual[i]), label=behind.label(why.signal, unit) if why.signal else None,
            rarity=None if fires is None else fires.share(unit), link=behind.link(why.signal, unit) if why.signal else "",
        )  # fmt: skip

    return Reasons(evidence.target, why.says, tuple(part(i) for i in first), len(why.ids), heat)

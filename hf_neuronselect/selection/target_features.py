"""The features that carry a target most against its pool, with rows of the pool where each is strongest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core.errors import NeuronSelectError
from ..explain.explanation import Part
from ..explain.features import Snippet, TargetFeature, leading, snippet_of
from ..methods.prototype import SparsePrototypeMethod
from ..rows.formats import Conversation
from ..signals.base import signals_of
from ..signals.heat import unit_values
from .sample import PoolSample
from .why import Explainer

MOST, SNIPPETS = 8, 2
"""Features of a target, and rows of each."""
_OPENING = 160  # characters of a row whose tokens are not at hand


def target_features(explainer: Explainer, sample: PoolSample) -> tuple[TargetFeature, ...]:
    """Features of a target; none of a method that has no prototype of them.

    Each row that is quoted costs a pass, at most 16 of them.
    """
    evidence, behind = explainer.evidence, explainer.behind
    method, signal = evidence.method, sample.signal
    own = [one.name for one in signals_of(method.signals)]
    if not isinstance(method, SparsePrototypeMethod) or signal not in sample.fires or signal not in own:
        return ()
    fires = sample.fires[signal]
    units, shares, usual = leading(
        evidence.selector.scored_against[evidence.target]["prototype"], fires.total / max(1, fires.pool), MOST
    )
    rows = _strongest(sample, units)
    snippets = _snippets(explainer, signal, rows)
    return tuple(
        TargetFeature(
            Part(
                f"{method.unit} {unit}", method.unit, unit, float(share), float(share), {}, label=behind.label(signal, unit),
                rarity=fires.share(unit), link=behind.link(signal, unit),
            ),
            float(of_pool), tuple(snippets[unit, row] for row in rows[unit] if (unit, row) in snippets),
        )
        for unit, share, of_pool in zip(units.tolist(), shares, usual, strict=True)
    )  # fmt: skip


def _strongest(sample: PoolSample, units: np.ndarray) -> dict[int, list[int]]:
    """Unit -> numbers of the rows where it is strongest; a row serves one unit where there are enough."""
    sparse = sample.rows.sparse(sample.signal)
    row = np.repeat(np.arange(len(sparse)), np.diff(sparse.indptr))
    found: dict[int, list[int]] = {}
    used: set[int] = set()
    for unit in units.tolist():
        own = np.flatnonzero((sparse.indices == unit) & (sparse.values > 0))
        own = own[np.argsort(-sparse.values[own], kind="stable")][:40]
        numbers = sample.rows.index[row[own]].tolist()
        found[unit] = sorted(numbers, key=lambda number: number in used)[:SNIPPETS]
        used |= set(found[unit])
    return found


def _snippets(explainer: Explainer, signal: str, rows: dict[int, list[int]]) -> dict[tuple[int, int], Snippet]:
    """(unit, row) -> the row's tokens around the one where the unit is strongest; each row is read once."""
    evidence = explainer.evidence
    units: dict[int, list[int]] = {}
    for unit, numbers in rows.items():
        for number in numbers:
            units.setdefault(number, []).append(unit)
    found: dict[tuple[int, int], Snippet] = {}
    for number, own in units.items():
        text = evidence.text_of(number)
        if text is None:
            evidence.note("rows where features fire are shown where the pool is given (--pool)")
            continue
        found |= _of_row(explainer, signal, text, number, own)
    return found


def _of_row(
    explainer: Explainer, signal: str, text: Conversation, number: int, units: Sequence[int]
) -> dict[tuple[int, int], Snippet]:
    extractor = explainer.evidence.extractor
    if extractor is None:
        opening = Snippet(number, (" ".join(text.content()[: 4 * _OPENING].split())[:_OPENING],), np.zeros(0))
        return {(unit, number): opening for unit in units}
    try:
        tokens = unit_values(extractor, text, signal, units)
    except NeuronSelectError:  # a row that cannot be read is not quoted
        return {}
    snippets = (
        (unit, snippet_of(extractor.forward.tokenizer.decode, tokens, i, number)) for i, unit in enumerate(units)
    )
    return {(unit, number): one for unit, one in snippets if one is not None}

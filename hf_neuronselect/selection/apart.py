"""What each of many targets would pick with the whole budget, in one reading of the pool."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from datasets import Dataset

from ..core.configs import KeepOptions
from ..core.provenance import Budget, SourceRecord
from ..store.store import FeatureStore
from .marks import Marks
from .reader import Reader
from .scan import Tally, scan
from .scores import PoolScores
from .selector import NeuronSelector
from .stages import opened, spooled


def picks_apart(
    selector: NeuronSelector, pool: Dataset, budget: Budget, options: KeepOptions, store: FeatureStore | None,
    marks: Marks | None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Rows that every fitted target would pick if it were alone: target -> int64, best first.

    Args:
        options: which rows are left out, and how picks are kept apart. store, marks: as of :meth:`~hf_neuronselect.NeuronSelector.select`.
    """
    reader = Reader(
        selector.method.signals, selector.extractor, dict(selector.identities),
        needs_rows=bool(options.exclude) and marks is None, store=store, compact=selector.compact_signals(),
    )  # fmt: skip
    method, compared = opened(selector.method, selector.picker, pool, SourceRecord(), reader)
    with spooled(method, pool, reader):
        found = scan(
            pool,
            reader,
            method,
            selector.scored_against,
            selector.leakage,
            options.exclude,
            Tally(),
            None,
            marks,
            compared,
        )
        rows = selector.extractor.extraction.options if selector.extractor else None
        scored = PoolScores.of(
            pool, found, "quota", None, selector.picker, compared, options.spread, rows, selector.avoided,
            selector.avoid_weight,
        )  # fmt: skip
    return {name: replace(scored, scores={name: scores}).pick(budget).indices for name, scores in scored.scores.items()}

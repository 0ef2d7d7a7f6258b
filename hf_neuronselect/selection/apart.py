"""What each of many targets would pick with the whole budget, in one reading of the pool."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from datasets import Dataset

from ..core.provenance import Budget, SourceRecord
from ..methods.base import vector_signal
from ..methods.each import EachExemplar
from ..store.store import FeatureStore
from .budget import pick
from .marks import Marks
from .reader import Reader
from .scan import Tally, scan
from .scores import PoolScores
from .selector import NeuronSelector
from .stages import prepared, spooled


def picks_apart(
    selector: NeuronSelector, pool: Dataset, budget: Budget, exclude: Sequence[str], store: FeatureStore | None,
    marks: Marks | None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Rows that every fitted target would pick if it were alone: target -> int64, best first.

    Args:
        exclude, store, marks: as of :meth:`~hf_neuronselect.NeuronSelector.select`.
    """
    compared = vector_signal(selector.method, selector.picker)
    method = prepared(selector.method, pool, SourceRecord())
    method = EachExemplar(method) if selector.picker.each else method
    reader = Reader(
        (*method.signals, *compared), selector.extractor, dict(selector.identities),
        needs_rows=bool(exclude) and marks is None, store=store,
        compact=() if compared else selector.compact_signals(),
    )  # fmt: skip
    with spooled(method, pool, reader):
        found = scan(pool, reader, method, selector.targets, selector.leakage, exclude, Tally(), None, marks, compared)
        scored = PoolScores.of(pool, found, "quota", None, selector.picker, compared)
    taken = partial(pick, valid=scored.valid, n_tokens=scored.n_tokens, budget=budget, picker=selector.picker,
                    vectors=scored.vectors)  # fmt: skip
    return {name: taken({name: scores}).indices for name, scores in scored.scores.items()}

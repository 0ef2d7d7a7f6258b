"""Where the units of a sparse signal fire in a pool, read from its store in one sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..signals.columns import RowBatch
from ..store.store import FeatureStore, columns_of


@dataclass(frozen=True)
class Firing:
    """Where one unit fires.

    Attributes:
        rows: how many rows of the pool it fires in. best: the rows where it is strongest, with its value there.
    """

    rows: int
    best: tuple[tuple[int, float], ...]


def firing_in(
    store: FeatureStore, signal: str, identity: str, units: Sequence[int], *, best: int = 3, without: Sequence[int] = ()
) -> dict[int, Firing]:
    """Where units fire in a pool.

    Args:
        best: rows given of each unit. without: rows that are not given among them.
    """
    asked = np.unique(np.asarray(units, np.int64))
    wanted = np.zeros(int(asked.max(initial=0)) + 1, dtype=bool)
    wanted[asked] = True
    parts, start = [], 0
    for tables in store.batches({signal: identity}):
        n = len(tables[signal])
        sparse = RowBatch(np.arange(n), np.ones(n, bool), columns_of(tables)).sparse(signal)
        at = np.flatnonzero((sparse.indices < len(wanted)) & wanted[np.minimum(sparse.indices, len(wanted) - 1)])
        row = np.searchsorted(sparse.indptr, at, side="right") - 1 + start
        parts.append((sparse.indices[at], row, sparse.values[at].astype(np.float64)))
        start += n
    unit, row, value = (np.concatenate(part) for part in zip(*parts, strict=True))
    found = {}
    for one in asked.tolist():
        own = np.flatnonzero((unit == one) & (value > 0))
        shown = own[~np.isin(row[own], np.asarray(without, np.int64))]
        shown = shown[np.lexsort((row[shown], -value[shown]))][:best]
        found[one] = Firing(len(own), tuple(zip(row[shown].tolist(), value[shown].tolist(), strict=True)))
    return found

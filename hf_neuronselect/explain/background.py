"""Where the units of a sparse signal fire in a pool, read from its store in one sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..signals.columns import RowBatch
from ..store.store import FeatureStore, columns_of


@dataclass(frozen=True)
class Firing:
    """Where units fire in a pool.

    Attributes:
        rows: unit -> how many rows of the pool it fires in. best: unit -> the rows where it is strongest, with its values.
    """

    rows: dict[int, int]
    best: dict[int, tuple[tuple[int, float], ...]]


def firing_in(
    store: FeatureStore, signal: str, identity: str, units: Sequence[int], *, told: int, best: int = 3,
    without: Sequence[int] = (),
) -> Firing:  # fmt: skip
    """Where units fire in a pool.

    Args:
        told: of the first so many units the best rows are found. best: how many rows. without: rows that are not among them.
    """
    asked = np.unique(np.asarray(units, np.int64))
    counts = np.zeros(int(asked.max(initial=0)) + 1, np.int64)
    wanted = np.zeros(len(counts), dtype=bool)
    wanted[list(units[:told])] = True
    parts, start = [], 0
    for tables in store.batches({signal: identity}):
        n = len(tables[signal])
        sparse = RowBatch(np.arange(n), np.ones(n, bool), columns_of(tables)).sparse(signal)
        known = (sparse.indices < len(counts)) & (sparse.values > 0)
        counts += np.bincount(sparse.indices[known], minlength=len(counts))
        at = np.flatnonzero(known & wanted[np.minimum(sparse.indices, len(counts) - 1)])
        row = np.searchsorted(sparse.indptr, at, side="right") - 1 + start
        parts.append((sparse.indices[at], row, sparse.values[at].astype(np.float64)))
        start += n
    unit, row, value = (np.concatenate(part) for part in zip(*parts, strict=True))
    shown = ~np.isin(row, np.asarray(without, np.int64))
    found = {}
    for one in dict.fromkeys(units[:told]):
        own = np.flatnonzero((unit == one) & shown)
        own = own[np.lexsort((row[own], -value[own]))][:best]
        found[int(one)] = tuple(zip(row[own].tolist(), value[own].tolist(), strict=True))
    return Firing({int(one): int(counts[one]) for one in asked}, found)

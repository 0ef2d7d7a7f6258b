"""Picks spread over the pool's sources, and without near copies."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from datasets import Dataset, IterableDataset

from ..core.errors import NeuronSelectError
from ..core.options import RowOptions
from ..core.provenance import Budget
from ..core.spread import Spread
from ..rows.formats import read_row, row_format, rows_of
from ..rows.near import NearCopies, check_datasketch, min_hash
from .reader import own_columns

_BLOCK = 256


def check_spread(spread: Spread | None, pool: Dataset | IterableDataset, budget: Budget) -> None:
    """Refuse what cannot be, before rows are scored.

    Raises:
        NeuronSelectError: a stream, no such column, or a budget that says no number of rows.
    """
    if not spread:
        return
    if isinstance(pool, IterableDataset):
        raise NeuronSelectError("picks of a stream cannot be spread: load the pool as a Dataset", option="streaming")
    if spread.drop_near_copies:
        check_datasketch("drop_near_copies")
    if spread.source_share is None:
        return
    if budget.ratio is None and budget.k is None:
        raise NeuronSelectError("needs k or ratio, which say how many rows a source may have", option="source_share",
                                value=spread.source_share)  # fmt: skip
    if spread.source_column not in pool.column_names:
        raise NeuronSelectError(f"the pool has no such column; it has {', '.join(pool.column_names)}",
                                option="source_column", value=spread.source_column)  # fmt: skip


def spread_out(order: np.ndarray, wanted: int | None, spread: Spread, pool: Dataset, options: RowOptions) -> np.ndarray:
    """Rows in their order, without those of a source that has its share, and without near copies of rows before.

    Args:
        order: int64, best first. wanted: stop at so many rows.
    """
    fmt = row_format(own_columns(pool.column_names), options.row_format, options.columns)
    texts = pool.with_format(None).select_columns(fmt.used)
    sources = None if spread.source_share is None else np.asarray(pool.with_format(None)[spread.source_column][:])
    most = math.inf if spread.source_share is None else max(1, math.floor(spread.source_share * (wanted or len(order))))
    taken: list[int] = []
    counts, known = Counter[object](), NearCopies() if spread.drop_near_copies else None
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK].tolist()
        rows = rows_of(texts[block]) if known is not None else []
        for place, i in enumerate(block):
            if wanted is not None and len(taken) >= wanted:
                return np.asarray(taken, dtype=np.int64)
            source = None if sources is None else sources[i]
            if counts[source] >= most:
                continue
            if known is not None:
                hashes = min_hash(read_row(rows[place], fmt).words())
                if known.of(hashes):
                    continue
                known.add(hashes)
            counts[source] += 1
            taken.append(i)
    return np.asarray(taken, dtype=np.int64)

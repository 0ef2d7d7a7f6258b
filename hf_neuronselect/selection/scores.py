"""The table of every pool row's scores."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from .budget import Picked
from .scan import EXCLUDED


def score_table(
    scores: Mapping[str, np.ndarray],
    picked: Picked,
    n_tokens: np.ndarray,
    truncated: np.ndarray,
    excluded: np.ndarray,
    index: np.ndarray | None = None,
) -> pa.Table:
    """Every pool row: source_index, score[, score_<target>], rank, n_tokens, truncated, selected, excluded."""
    index = np.arange(len(n_tokens)) if index is None else index
    chosen = np.zeros(len(index), dtype=bool)
    chosen[picked.indices] = True
    columns: dict[str, pa.Array] = {
        "source_index": pa.array(index, pa.int64()),
        "score": pa.array(picked.score, pa.float64(), from_pandas=True),
    }
    if len(scores) > 1:
        for name, values in scores.items():
            columns[f"score_{name}"] = pa.array(values, pa.float64(), from_pandas=True)
    return pa.table(
        columns
        | {
            "rank": pa.array(picked.rank, pa.int64(), mask=picked.rank < 0),
            "n_tokens": pa.array(n_tokens, pa.int32(), mask=n_tokens < 0),
            "truncated": pa.array(truncated, pa.bool_()),
            "selected": pa.array(chosen, pa.bool_()),
            "excluded": pa.array([EXCLUDED[code] or None for code in excluded], pa.string()),
        }
    )

"""Scores of every row of a pool, and the rows picked from them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..core.errors import NeuronSelectWarning
from ..core.options import ExtractionOptions, RowOptions
from ..core.provenance import Budget
from ..core.spread import Spread
from ..pickers.base import Picker, row_scores
from ..pickers.vectors import Vectors
from .avoid import less_avoided
from .budget import Picked, pick
from .reader import added_columns
from .scan import EXCLUDED, Scored
from .spread import spread_out


def score_table(
    scores: Mapping[str, np.ndarray],
    picked: Picked,
    n_tokens: np.ndarray,
    truncated: np.ndarray,
    excluded: np.ndarray,
    index: np.ndarray | None = None,
    avoided: Mapping[str, np.ndarray] | None = None,
) -> pa.Table:
    """Every pool row: source_index, score[, score_<target>][, avoided_<target>], rank, n_tokens, truncated, selected, excluded.

    Args:
        avoided: raw scores ``[N]`` of avoided targets.
    """
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
    for name, values in (avoided or {}).items():
        columns[f"avoided_{name}"] = pa.array(values, pa.float64(), from_pandas=True)
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


@dataclass(frozen=True)
class PoolScores:
    """Scores of a whole pool, from which rows can be picked under any budget.

    Attributes:
        scores: target -> float64 ``[N]`` or ``[N, exemplars]``, less what avoided targets take off.
        n_tokens, truncated, excluded: ``[N]``. avoided: target -> raw score ``[N]``.
    """

    pool: Dataset
    scores: dict[str, np.ndarray]
    n_tokens: np.ndarray
    truncated: np.ndarray
    excluded: np.ndarray
    aggregate: str
    weights: Mapping[str, float] | None
    picker: Picker
    vectors: Vectors | None = None
    spread: Spread | None = None
    options: RowOptions | None = None
    avoided: Mapping[str, np.ndarray] | None = None

    @classmethod
    def of(
        cls, pool: Dataset, found: Iterable[Scored], aggregate: str, weights: Mapping[str, float] | None,
        picker: Picker, compared: Sequence[str] = (), spread: Spread | None = None, options: RowOptions | None = None,
        avoided: Collection[str] = (), avoid_weight: float = 1.0,
    ) -> PoolScores:  # fmt: skip
        """Collect scored batches.

        Args:
            compared: the signal whose vectors the picker compares, or none. spread: how picks are kept apart.
            options: how the pool's rows are read. avoided: names of targets that are avoided, of those scored.
        """
        parts = list(found)
        vectors = Vectors.of([part.vectors for part in parts], compared[0]) if compared else None
        scores = {name: np.concatenate([part.scores[name] for part in parts]) for name in parts[0].scores}
        n_tokens, truncated, excluded = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("n_tokens", "truncated", "excluded")
        )
        return cls(
            pool,
            less_avoided(scores, avoided, avoid_weight),
            n_tokens,
            truncated,
            excluded,
            aggregate,
            weights,
            picker,
            vectors,
            spread,
            options,
            {name: row_scores(scores[name]) for name in avoided},
        )

    @property
    def valid(self) -> np.ndarray:
        """Rows that can be selected: bool ``[N]``."""
        return self.excluded == 0

    def choose(self, budget: Budget) -> tuple[Dataset, np.ndarray, pa.Table]:
        """Pick rows; returns them, their numbers in the pool, and the score table."""
        able = int(self.valid.sum())
        if budget.k is not None and budget.k > able:
            warnings.warn(
                f"k={budget.k} is more than the {able} rows that can be selected: all are taken; ask for fewer, or give a larger pool",
                NeuronSelectWarning,
                stacklevel=4,
            )
        picked = self.pick(budget)
        if budget.k is not None and len(picked.indices) < min(budget.k, able):
            warnings.warn(
                f"k={budget.k}: only {len(picked.indices)} rows are left by source_share and drop_near_copies: allow more, or "
                "give a larger pool",
                NeuronSelectWarning,
                stacklevel=4,
            )
        of_row = {name: row_scores(values) for name, values in self.scores.items()}
        table = score_table(of_row, picked, self.n_tokens, self.truncated, self.excluded, avoided=self.avoided)
        return self._rows(picked, of_row), picked.indices, table

    def pick(self, budget: Budget) -> Picked:
        """Choose rows, spread as asked."""
        options = self.options or ExtractionOptions()
        thin = partial(spread_out, spread=self.spread, pool=self.pool, options=options) if self.spread else None
        return pick(
            self.scores, self.valid, self.n_tokens, budget, aggregate=self.aggregate, weights=self.weights,
            picker=self.picker, vectors=self.vectors, thin=thin,
        )  # fmt: skip

    def _rows(self, picked: Picked, scores: Mapping[str, np.ndarray]) -> Dataset:
        """The picked rows as they came, with ``neuron_score``, ``neuron_rank`` and ``source_index``."""
        rows, indices = (
            self.pool.with_format(None).remove_columns(added_columns(self.pool.column_names)),
            picked.indices,
        )
        # Taken as one table: an index mapping would be flattened again for each column added.
        rows = Dataset(rows.with_format("arrow")[indices.tolist()], info=rows.info.copy(), split=rows.split)
        columns = {
            "neuron_score": picked.score[indices],
            "neuron_rank": np.arange(len(indices)),
            "source_index": indices,
        }
        if len(scores) > 1:
            columns |= {f"neuron_score_{name}": values[indices] for name, values in scores.items()}
        for name, values in columns.items():
            rows = rows.add_column(name, values)
        return rows

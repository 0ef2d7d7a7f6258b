"""Share of relevant rows among the best-scored rows of a pool."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
The share of relevant rows among the k best-scored rows of a labelled pool, compared with the share in the whole pool.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of float, the score of every row of the pool, higher is better; nan is never selected.
    references: list of 0 or 1, 1 for a relevant row.
    k: int, rows selected. Give k or ratio.
    ratio: float in (0, 1], the share selected: k = max(1, floor(ratio * rows + 0.5)) of all rows.
Returns:
    precision: float, relevant rows among the selected / selected rows.
    recall: float, relevant rows among the selected / relevant rows.
    base_rate: float, relevant rows / all rows, including rows scored nan.
    lift: float, precision / base_rate.
    k: int, rows selected; fewer than requested if fewer have a score.
"""

_CITATION = """\
@misc{hf_neuronselect,
  title={hf_neuronselect: instruction data selection by a model's own neurons},
  author={{The hf\\_neuronselect developers}}
}
"""


def precision_at_budget(
    predictions: Sequence[float], references: Sequence[float], k: int | None = None, ratio: float | None = None
) -> dict[str, Any]:
    """Compute precision, recall and lift of the best-scored rows; ties go to the smaller row number.

    Args:
        predictions: ``[n]`` scores. references: ``[n]``, 0 or 1. k, ratio: the budget; give one of them.

    Returns:
        ``precision``, ``recall``, ``base_rate``, ``lift`` and ``k``.

    Raises:
        ValueError: not exactly one budget, a budget out of range, references other than 0 and 1, no relevant row, or
            no score.
    """
    scores = np.asarray(predictions, dtype=np.float64)
    relevant = np.asarray(references, dtype=np.float64)
    if scores.ndim != 1 or scores.shape != relevant.shape:
        raise ValueError(f"predictions {scores.shape} and references {relevant.shape} must be lists of the same length")
    wrong = np.flatnonzero((relevant != 0) & (relevant != 1))
    if len(wrong):
        raise ValueError(f"references: row {wrong[0]} is {relevant[wrong[0]]}; give 1 for a relevant row, else 0")
    if not relevant.any():
        raise ValueError("references: no row is relevant, so recall and lift are undefined")
    rows = np.flatnonzero(~np.isnan(scores))
    if not len(rows):
        raise ValueError("predictions: every score is nan; nothing can be selected")
    order = rows[np.lexsort((rows, -scores[rows]))]
    chosen = order[: _budget(len(scores), k, ratio)]
    hits, total = float(relevant[chosen].sum()), float(relevant.sum())
    precision, base_rate = hits / len(chosen), total / len(scores)
    return {
        "precision": precision,
        "recall": hits / total,
        "base_rate": base_rate,
        "lift": precision / base_rate,
        "k": len(chosen),
    }


def _budget(total: int, k: int | None, ratio: float | None) -> int:
    if (k is None) == (ratio is None):
        raise ValueError(f"k={k!r}, ratio={ratio!r}: give exactly one of them")
    if ratio is not None:
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio={ratio!r}: must lie in (0, 1]; 0.05 selects 5 %")
        return max(1, math.floor(ratio * total + 0.5))
    if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
        raise ValueError(f"k={k!r}: must be a whole number of at least 1")
    return int(k)


class PrecisionAtBudget(evaluate.Metric):
    """Precision at a budget as an ``evaluate`` metric."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            # References are floats, so that 0.7 is refused: an int64 column would silently truncate it to 0.
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(
        self,
        predictions: Sequence[float],
        references: Sequence[float],
        k: int | None = None,
        ratio: float | None = None,
    ) -> dict[str, Any]:
        return precision_at_budget(predictions, references, k, ratio)
